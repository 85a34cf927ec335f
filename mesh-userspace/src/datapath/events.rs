//! What the programs report: closed connections, verdicts, and debug logs of an object built with them.

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use mesh_common::event::{CloseRecord, FlowRecord, VerdictRecord};
use std::io;
use std::os::fd::AsRawFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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
pub struct Events(AsyncFd<RingBuf<MapData>>);

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>) -> anyhow::Result<Self> {
        Ok(Self(readable(ring).context("cannot wait for the kernel's events")?))
    }

    /// The next record; waits for one. Cancel safe.
    ///
    /// # Errors
    ///
    /// The runtime's, when it shuts down.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            // Before waiting: readiness is edge-triggered.
            if let Some(record) = self.take() {
                return Ok(record);
            }
            let mut ready = self.0.readable_mut().await?;
            // A record written after this look makes it ready again.
            ready.clear_ready();
        }
    }

    fn take(&mut self) -> Option<Event> {
        while let Some(item) = self.0.get_mut().next() {
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
