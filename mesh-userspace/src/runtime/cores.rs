//! The threads that carry traffic: one for each processor, each with a runtime of its own.
//!
//! A connection is served by one thread from its first byte to its last. With a run queue that threads share, the thread
//! that waits for sockets is woken for every packet of a connection that another one is already reading: half of the
//! time that small messages took, and a tenth of bulk's (docs/PERFORMANCE.md).

mod threads;

pub use threads::CoreThreads;

use super::polling::{Allowance, Polled};
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

/// A connection stays where it was accepted while that core has at most this many more than the one that has fewest, and
/// a quarter: to hand it over costs waking another thread.
const SLACK: usize = 1;

thread_local! {
    /// Which core this thread is, if it is one.
    static HERE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A handle to the threads.
#[derive(Clone, Debug)]
pub struct Cores {
    cores: Arc<[Core]>,
    allowance: Option<Arc<Allowance>>,
}

#[derive(Debug)]
struct Core {
    handle: Handle,
    /// Connections that it serves.
    load: AtomicUsize,
}

/// A connection's place on a core: it counts there while this lives.
#[derive(Debug)]
#[must_use]
pub struct Seat {
    cores: Cores,
    index: usize,
}

impl Cores {
    /// The runtime of the caller in place of threads. Must be called inside a tokio runtime.
    #[must_use]
    pub fn current() -> Self {
        let cores = [Core { handle: Handle::current(), load: AtomicUsize::new(0) }].into();
        Self { cores, allowance: None }
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.cores.len()
    }

    /// What was spent on waiting awake.
    #[must_use]
    pub fn polled(&self) -> Polled {
        self.allowance.as_ref().map_or_else(Polled::default, |allowance| allowance.polled())
    }

    /// The core of this thread; the first one on threads that are none.
    #[must_use]
    pub fn here(&self) -> usize {
        HERE.get().unwrap_or_default()
    }

    /// The core that serves fewest.
    fn idlest(&self) -> usize {
        (0..self.count()).min_by_key(|index| self.load(*index)).unwrap_or_default()
    }

    /// The runtime of a core.
    ///
    /// # Panics
    /// If there are not as many.
    #[must_use]
    pub fn handle(&self, index: usize) -> &Handle {
        &self.cores[index].handle
    }

    /// Serves a connection that was accepted here, on this core or one that has less to do. The future keeps the seat by
    /// itself: one around it would be as large again.
    pub fn serve<F>(&self, tracker: &TaskTracker, socket: TcpStream, serve: impl FnOnce(TcpStream, Seat) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let seat = self.seat();
        let socket = if self.is_here(seat.index) {
            socket
        } else {
            let moved = socket.into_std().and_then(|socket| {
                let _there = self.handle(seat.index).enter();
                TcpStream::from_std(socket)
            });
            match moved {
                Ok(socket) => socket,
                Err(error) => return tracing::warn!(%error, "a connection is lost between two threads"),
            }
        };
        let handle = self.handle(seat.index).clone();
        tracker.spawn_on(serve(socket, seat), &handle);
    }

    /// Registers a listener with a core, whose tasks only may accept from it then.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn listener(&self, index: usize, listener: std::net::TcpListener) -> io::Result<TcpListener> {
        let _there = self.handle(index).enter();
        TcpListener::from_std(listener)
    }

    /// Does something that lasts on a core that has little to do.
    pub fn spawn<F>(&self, tracker: &TaskTracker, serve: impl FnOnce(Seat) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let seat = self.seat();
        let handle = self.handle(seat.index).clone();
        tracker.spawn_on(serve(seat), &handle);
    }

    fn seat(&self) -> Seat {
        let idlest = self.idlest();
        let least = self.load(idlest);
        let index = match HERE.get() {
            Some(here) if self.load(here) <= least + least / 4 + SLACK => here,
            _ => idlest,
        };
        self.cores[index].load.fetch_add(1, Relaxed);
        Seat { cores: self.clone(), index }
    }

    fn load(&self, index: usize) -> usize {
        self.cores[index].load.load(Relaxed)
    }

    fn is_here(&self, index: usize) -> bool {
        // Without threads of their own, all are.
        HERE.get().map_or_else(|| self.cores[index].handle.id() == Handle::current().id(), |here| here == index)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.cores.cores[self.index].load.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::num::NonZeroUsize;
    use std::sync::Mutex;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const LIMIT: Duration = Duration::from_secs(30);

    fn two() -> (Cores, CoreThreads) {
        Cores::start(NonZeroUsize::new(2), 0.5, || Ok(())).unwrap()
    }

    async fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn connections_are_spread_over_the_cores_and_work_there() {
        let (cores, _threads) = two();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (tracker, seen) = (TaskTracker::new(), Arc::<Mutex<BTreeMap<String, usize>>>::default());
        let mut nears = Vec::new();
        for _ in 0..6 {
            let (near, far) = pair(&listener).await;
            nears.push(near);
            let seen = Arc::clone(&seen);
            cores.serve(&tracker, far, move |mut far, seat| async move {
                let thread = std::thread::current().name().unwrap_or_default().to_owned();
                *seen.lock().unwrap().entry(thread).or_default() += 1;
                let byte = far.read_u8().await.unwrap();
                far.write_u8(byte + 1).await.unwrap();
                drop(seat);
            });
        }
        assert_eq!((cores.load(0), cores.load(1)), (3, 3));
        for near in &mut nears {
            near.write_u8(1).await.unwrap();
            assert_eq!(tokio::time::timeout(LIMIT, near.read_u8()).await.unwrap().unwrap(), 2);
        }
        tracker.close();
        tokio::time::timeout(LIMIT, tracker.wait()).await.unwrap();
        let spread = BTreeMap::from([("data-0".to_owned(), 3), ("data-1".to_owned(), 3)]);
        assert_eq!(*seen.lock().unwrap(), spread);
        assert_eq!((cores.load(0), cores.load(1)), (0, 0));
    }

    #[tokio::test]
    async fn a_connection_stays_where_it_was_accepted_while_that_core_has_little_more_to_do() {
        let (cores, _threads) = two();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = cores.listener(1, listener).unwrap();
        let (tracker, there) = (TaskTracker::new(), cores.clone());
        let accepting = cores.handle(1).spawn(async move {
            for _ in 0..10 {
                let far = listener.accept().await.unwrap().0;
                there.serve(&tracker, far, |far, seat| async move {
                    let _held = (far, seat);
                    std::future::pending::<()>().await;
                });
            }
        });
        let mut nears = Vec::new();
        for _ in 0..10 {
            nears.push(TcpStream::connect(address).await.unwrap());
        }
        tokio::time::timeout(LIMIT, accepting).await.unwrap().unwrap();
        let (other, own) = (cores.load(0), cores.load(1));
        assert_eq!(other + own, 10);
        assert!(own > other && own <= other + other / 4 + SLACK + 1, "{own} and {other}");
    }

    #[tokio::test]
    async fn what_the_threads_serve_ends_with_them() {
        let (cores, threads) = two();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut near, far) = pair(&listener).await;
        let tracker = TaskTracker::new();
        cores.serve(&tracker, far, |far, seat| async move {
            let _held = (far, seat);
            std::future::pending::<()>().await;
        });
        tokio::task::spawn_blocking(|| drop(threads)).await.unwrap();
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }

    #[test]
    fn a_thread_that_cannot_be_prepared_is_no_start() {
        let error = Cores::start(NonZeroUsize::new(1), 0.0, || Err(io::Error::other("not here"))).unwrap_err();
        assert_eq!(error.to_string(), "not here");
    }
}
