//! How long a flow lives.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Without a datagram in either direction, a flow ends after this.
pub(super) const IDLE: Duration = Duration::from_secs(60);
/// Likewise a flow that has asked once and was answered, as a resolver's is: its socket is most likely gone.
const ANSWERED_IDLE: Duration = Duration::from_secs(5);

/// A flow's counts, shared by both of its directions.
#[derive(Debug)]
pub(super) struct Life {
    began: Instant,
    /// Milliseconds after the beginning.
    used: AtomicU64,
    requests: AtomicU64,
    replies: AtomicU64,
    answered: Notify,
    ended: Notify,
    is_refused: AtomicBool,
}

impl Life {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            used: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            replies: AtomicU64::new(0),
            answered: Notify::new(),
            ended: Notify::new(),
            is_refused: AtomicBool::new(false),
        }
    }

    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Relaxed);
        self.touch();
    }

    pub(super) fn reply(&self) {
        if self.replies.fetch_add(1, Relaxed) == 0 {
            self.answered.notify_one();
        }
        self.touch();
    }

    /// Whether anything has come back.
    pub(super) fn is_answered(&self) -> bool {
        self.replies.load(Relaxed) > 0
    }

    /// Ready once the first reply has come; for one to wait for.
    pub(super) async fn answered(&self) {
        self.answered.notified().await;
    }

    fn touch(&self) {
        let elapsed = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.used.store(elapsed, Relaxed);
    }

    /// When a datagram passed last.
    pub(super) fn used_at(&self) -> Instant {
        self.began + Duration::from_millis(self.used.load(Relaxed))
    }

    /// Ends the flow before its time.
    pub(super) fn end(&self) {
        self.ended.notify_one();
    }

    /// Ends the flow: nobody has the port that it leads to.
    pub(super) fn refuse(&self) {
        self.is_refused.store(true, Relaxed);
        self.end();
    }

    pub(super) fn is_refused(&self) -> bool {
        self.is_refused.load(Relaxed)
    }

    /// Ready once [`Self::end`] was called.
    pub(super) async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Ready once nothing has passed for long.
    pub(super) async fn idle(&self) {
        loop {
            let end = self.used_at() + self.patience();
            if Instant::now() >= end {
                return;
            }
            // A second request makes the end later, a first reply earlier.
            tokio::time::sleep_until(end.min(Instant::now() + ANSWERED_IDLE)).await;
        }
    }

    fn patience(&self) -> Duration {
        let is_answered = self.requests.load(Relaxed) == 1 && self.replies.load(Relaxed) > 0;
        if is_answered { ANSWERED_IDLE } else { IDLE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flow_outlives_its_last_datagram_by_the_idle_time() {
        let (life, start) = (Life::new(), Instant::now());
        life.request();
        tokio::time::sleep(Duration::from_secs(30)).await;
        life.request();
        life.idle().await;
        assert_eq!(start.elapsed(), Duration::from_secs(90));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_reply_is_told_once() {
        let life = Life::new();
        life.request();
        assert!(!life.is_answered());
        life.reply();
        life.answered().await;
        life.reply();
        let again = tokio::time::timeout(Duration::from_secs(1), life.answered());
        assert!(again.await.is_err() && life.is_answered());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_flow_ends_at_once_and_says_so() {
        let life = Life::new();
        life.refuse();
        life.ended().await;
        assert!(life.is_refused());
        let evicted = Life::new();
        evicted.end();
        evicted.ended().await;
        assert!(!evicted.is_refused());
    }

    #[tokio::test(start_paused = true)]
    async fn one_question_and_its_answer_end_soon() {
        let (life, start) = (Life::new(), Instant::now());
        life.request();
        life.reply();
        life.idle().await;
        assert!(start.elapsed() < Duration::from_secs(11), "{:?}", start.elapsed());
    }
}
