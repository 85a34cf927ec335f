//! The connections to one peer: the one that takes new streams, and those before it.

use super::flow::Flows;
use super::halves::Use;
use crate::identity::expiry;
use crate::tunnel::lifetime::Lifetime;
use quinn::Connection;
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use time::OffsetDateTime;
use tokio::time::Instant;

#[derive(Debug, Default)]
pub(super) struct Connections {
    /// Takes new streams while its certificates are fresh.
    pub(super) current: Option<Pooled>,
    /// Those before it that still have streams.
    pub(super) retired: Vec<Pooled>,
}

#[derive(Clone, Debug)]
pub(super) struct Pooled {
    pub(super) connection: Connection,
    pub(super) usage: Use,
    pub(super) lifetime: Lifetime,
    pub(super) flows: Arc<Flows>,
}

impl Pooled {
    /// Streams in use: each holds the counters twice, the pool and the connection's task once each.
    pub(super) fn streams(&self) -> usize {
        Arc::strong_count(&self.usage).saturating_sub(2).div_ceil(2)
    }

    pub(super) fn is_retired(&self) -> bool {
        Instant::now() >= self.lifetime.renew
    }

    pub(super) fn is(&self, connection: &Connection) -> bool {
        self.connection.stable_id() == connection.stable_id()
    }
}

impl Connections {
    pub(super) fn all(&self) -> impl Iterator<Item = &Pooled> {
        self.current.iter().chain(&self.retired)
    }

    pub(super) fn replace(&mut self, pooled: Pooled) {
        let former = self.current.replace(pooled);
        self.retired.extend(former.filter(|former| former.connection.close_reason().is_none()));
    }
}

/// When the certificate ends that the peer has presented.
pub(super) fn peer_end(connection: &Connection) -> Option<OffsetDateTime> {
    expiry(&connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?)
}
