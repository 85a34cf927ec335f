//! A cancellation that costs those next to nothing who are woken for other reasons all the time.

use pin_project_lite::pin_project;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// A [`CancellationToken`] takes two locks, which all who wait for it share, whenever one of them is polled: here that is
/// the case for the first time only, and later a flag is read.
#[derive(Debug, Default)]
pub struct Cancellation {
    is_cancelled: AtomicBool,
    token: CancellationToken,
}

impl Cancellation {
    pub fn cancel(&self) {
        // First: whoever the token wakes looks at the flag.
        self.is_cancelled.store(true, Ordering::Release);
        self.token.cancel();
    }

    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }

    /// Ends when it is cancelled.
    pub fn cancelled(&self) -> Cancelled<'_> {
        Cancelled { cancellation: self, told: self.token.cancelled(), known: None }
    }

    /// For those who keep nothing else of its owner.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }
}

pin_project! {
    /// See [`Cancellation::cancelled`].
    pub struct Cancelled<'a> {
        cancellation: &'a Cancellation,
        #[pin]
        told: WaitForCancellationFuture<'a>,
        // Who will be woken.
        known: Option<Waker>,
    }
}

impl Future for Cancelled<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if this.cancellation.is_cancelled() {
            return Poll::Ready(());
        }
        if this.known.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        *this.known = Some(cx.waker().clone());
        this.told.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls as the task behind `woken`.
    fn poll(cancelled: Pin<&mut Cancelled<'_>>, woken: &Arc<Woken>) -> Poll<()> {
        cancelled.poll(&mut Context::from_waker(&Waker::from(woken.clone())))
    }

    #[test]
    fn the_task_that_asked_last_is_woken_however_often_it_has_asked() {
        let cancellation = Cancellation::default();
        let mut cancelled = pin!(cancellation.cancelled());
        let (first, second) = (Arc::<Woken>::default(), Arc::<Woken>::default());
        for woken in [&first, &first, &second, &second, &second] {
            assert!(poll(cancelled.as_mut(), woken).is_pending());
        }
        assert!(!cancellation.is_cancelled());
        cancellation.cancel();
        assert!(cancellation.is_cancelled() && cancellation.token().is_cancelled());
        assert_eq!([&first, &second].map(|woken| woken.0.load(Ordering::Relaxed)), [0, 1]);
        assert!(poll(cancelled.as_mut(), &second).is_ready());
    }

    #[test]
    fn who_comes_late_does_not_wait() {
        let cancellation = Cancellation::default();
        cancellation.cancel();
        assert!(poll(pin!(cancellation.cancelled()), &Arc::default()).is_ready());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn tasks_of_other_threads_end() {
        let cancellation = Arc::new(Cancellation::default());
        let tasks: Vec<_> = (0..100)
            .map(|_| {
                let cancellation = cancellation.clone();
                tokio::spawn(async move { cancellation.cancelled().await })
            })
            .collect();
        cancellation.cancel();
        for task in tasks {
            task.await.unwrap();
        }
    }
}
