//! The threads themselves.

use super::{Core, Cores, HERE};
use crate::runtime::polling::{self, Allowance};
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;

/// Tasks polled before sockets are looked at: bulk's take a good part of a millisecond each.
const TASKS_BETWEEN_LOOKS: u32 = 16;

/// The threads themselves; dropping this ends them, with everything that they serve.
#[derive(Debug)]
pub struct CoreThreads {
    stop: CancellationToken,
    threads: Vec<JoinHandle<()>>,
}

impl Cores {
    /// Starts so many threads, or one for each processor that the process may use; each prepares itself first. Together
    /// they may take a share of one processor for waiting awake.
    ///
    /// # Errors
    /// If threads cannot be started or prepared, or have no descriptors for their runtimes.
    pub fn start(
        threads: Option<NonZeroUsize>,
        polling: f64,
        prepare: fn() -> io::Result<()>,
    ) -> io::Result<(Self, CoreThreads)> {
        let count = threads.map_or_else(std::thread::available_parallelism, Ok)?.get();
        let mut threads = CoreThreads { stop: CancellationToken::new(), threads: Vec::with_capacity(count) };
        let mut cores = Vec::with_capacity(count);
        let allowance = Allowance::new(polling, Instant::now());
        for index in 0..count {
            let runtime = Builder::new_current_thread().enable_all().event_interval(TASKS_BETWEEN_LOOKS).build()?;
            cores.push(Core { handle: runtime.handle().clone(), load: AtomicUsize::new(0) });
            let (stop, allowance) = (threads.stop.clone(), allowance.clone());
            let (report, prepared) = sync_channel(1);
            let thread = std::thread::Builder::new().name(format!("data-{index}")).spawn(move || {
                HERE.set(Some(index));
                // The starter waits for exactly this.
                let _ = report.send(prepare());
                runtime.block_on(async {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = poll(allowance) => {}
                    }
                });
                runtime.shutdown_background();
            })?;
            threads.threads.push(thread);
            prepared.recv().map_err(io::Error::other)??;
        }
        Ok((Self { cores: cores.into(), allowance }, threads))
    }
}

async fn poll(allowance: Option<Arc<Allowance>>) {
    match allowance {
        Some(allowance) => polling::poll(allowance).await,
        None => std::future::pending().await,
    }
}

impl Drop for CoreThreads {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that carries traffic has panicked");
            }
        }
    }
}
