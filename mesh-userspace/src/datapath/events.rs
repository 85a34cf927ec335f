//! What the programs report: closed connections, verdicts, and debug logs of an object built with them.

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use mesh_common::event::{CloseRecord, FlowRecord, VerdictRecord};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// What the programs report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A captured connection's application socket closed.
    Closed(CloseRecord),
    /// A hook refused a connection, or admitted plaintext.
    Verdict(VerdictRecord),
    /// A connection that the kernel carries has begun, or one of its sockets closed.
    Flow(FlowRecord),
}

impl Event {
    /// The records' sizes tell them apart.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let closed = CloseRecord::from_bytes(bytes).map(Self::Closed);
        let verdict = || VerdictRecord::from_bytes(bytes).map(Self::Verdict);
        closed.or_else(verdict).or_else(|| FlowRecord::from_bytes(bytes).map(Self::Flow))
    }
}

/// Records of the programs, as the kernel writes them. Bounded by the ring buffer: what is not read in time is lost and
/// counted (`Outcome::EventLost`, `Outcome::VerdictLost`).
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    /// When records that wait are to be taken.
    due: Option<Instant>,
}

/// How long records gather. The kernel wakes the reader for a record before which all were taken, and for none of those
/// that follow until that one is taken, too: what comes within this time is one wake-up. Where it would become too much
/// (`event::is_crowded`), the programs wake the reader all the same.
const GATHERING: Duration = Duration::from_millis(25);

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>) -> anyhow::Result<Self> {
        Ok(Self { ring: readable(ring).context("cannot wait for the kernel's events")?, due: None })
    }

    /// Waits until there are records, and then for those that follow shortly. They are all to be taken before the next
    /// wait: of what is left nobody would be told. Cancel safe.
    ///
    /// # Errors
    ///
    /// The runtime's, when it shuts down.
    pub async fn wait(&mut self) -> io::Result<()> {
        let due = match self.due {
            Some(due) => due,
            None => {
                // Readiness is edge-triggered: a record written after this makes it ready again.
                self.ring.readable_mut().await?.clear_ready();
                *self.due.insert(Instant::now() + GATHERING)
            }
        };
        tokio::select! {
            () = sleep_until(due) => {}
            crowded = self.ring.readable_mut() => crowded?.clear_ready(),
        }
        self.due = None;
        Ok(())
    }

    /// The next record, if there is one.
    pub fn take(&mut self) -> Option<Event> {
        while let Some(item) = self.ring.get_mut().next() {
            match Event::parse(&item) {
                Some(record) => return Some(record),
                None => tracing::warn!(bytes = item.len(), "a kernel event of unknown shape is ignored"),
            }
        }
        None
    }
}

fn readable<T: AsRawFd>(ring: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the callers' rings own their map's descriptor and return the same one for as long as they live.
    unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(|error| error.into_parts().1)
}

/// Forwards the programs' debug logs to `log` until the runtime ends; `None` if the object was built without them.
pub(super) fn kernel_log(
    ebpf: &mut aya::Ebpf,
) -> anyhow::Result<Option<impl Future<Output = io::Result<()>> + Send + use<>>> {
    let logger = match aya_log::EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(aya_log::Error::MapNotFound) => return Ok(None),
        Err(error) => return Err(error).context("cannot read the programs' logs"),
    };
    let mut logger = readable(logger).context("cannot wait for the programs' logs")?;
    Ok(Some(async move {
        loop {
            logger.get_mut().flush();
            logger.readable_mut().await?.clear_ready();
            logger.get_mut().flush();
        }
    }))
}
