//! Real handshakes, over buffers in memory.

mod issued;
mod peers;
mod reload;
mod sessions;

use super::{ALPN, Identities, IdentityError, PeerRefusal, peer_identity, server_name};
use crate::ca::{Authority, Validity, init};
use crate::model::{SpiffeId, TrustDomain};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, NamedGroup, ServerConfig, ServerConnection};
use rustls_pki_types::{CertificateDer, ServerName};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use time::OffsetDateTime;

const CART: &str = "spiffe://example.org/ns/shop/sa/cart";
const SHOP: &str = "spiffe://example.org/ns/shop/sa/shop";
const BANK: &str = "spiffe://example.org/ns/bank/sa/bank";

fn id(uri: &str) -> SpiffeId {
    SpiffeId::parse(uri).unwrap()
}

fn domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn authority(trust_domain: &str) -> Authority {
    let directory = TempDir::new().unwrap();
    init(directory.path(), &TrustDomain::parse(trust_domain).unwrap()).unwrap();
    Authority::open(directory.path()).unwrap()
}

fn valid() -> Validity {
    Validity::starting_now(Duration::from_secs(3600)).unwrap()
}

/// From `start` to `end`, in seconds from now.
fn validity(start: i64, end: i64) -> Validity {
    let now = OffsetDateTime::now_utc();
    Validity { not_before: now + time::Duration::seconds(start), not_after: now + time::Duration::seconds(end) }
}

/// A node's identity directory and what was loaded from it.
struct Node {
    directory: TempDir,
    identities: Identities,
}

impl Node {
    /// Trusts the roots of `trusts`, holds certificates of `ids` by the first of them.
    fn new(trusts: &[&Authority], ids: &[&str]) -> Self {
        Self::with_validity(trusts, ids, valid())
    }

    fn with_validity(trusts: &[&Authority], ids: &[&str], validity: Validity) -> Self {
        let directory = TempDir::new().unwrap();
        for authority in trusts {
            authority.add_to_bundle(directory.path()).unwrap();
        }
        for uri in ids {
            trusts[0].sign(&id(uri), validity).unwrap().store(directory.path()).unwrap();
        }
        let identities = Identities::load(directory.path(), &domain()).unwrap();
        Self { directory, identities }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn dials(&self, source: &str, destination: &str) -> Arc<ClientConfig> {
        self.identities.client_config(&id(source), &id(destination)).unwrap()
    }
}

/// What each side made of a handshake.
struct Outcome {
    client: Result<ClientConnection, PeerRefusal>,
    server: Result<ServerConnection, PeerRefusal>,
}

impl Outcome {
    fn kinds(&self) -> (HandshakeKind, HandshakeKind) {
        let (client, server) = (self.client.as_ref().unwrap(), self.server.as_ref().unwrap());
        (client.handshake_kind().unwrap(), server.handshake_kind().unwrap())
    }

    fn resumed(&self) -> bool {
        match self.kinds() {
            (HandshakeKind::Resumed, HandshakeKind::Resumed) => true,
            (client, server) => {
                assert!(client != HandshakeKind::Resumed && server != HandshakeKind::Resumed);
                false
            }
        }
    }

    fn refusals(&self) -> (Option<PeerRefusal>, Option<PeerRefusal>) {
        (self.client.as_ref().err().copied(), self.server.as_ref().err().copied())
    }

    fn identities(&self) -> (Result<SpiffeId, PeerRefusal>, Result<SpiffeId, PeerRefusal>) {
        let (client, server) = (self.client.as_ref().unwrap(), self.server.as_ref().unwrap());
        (peer_identity(client.peer_certificates().unwrap()), peer_identity(server.peer_certificates().unwrap()))
    }
}

/// Shakes hands, and goes on until neither side has anything to say: tickets and late alerts come after.
fn shake(client: &Arc<ClientConfig>, name: ServerName<'static>, server: &Arc<ServerConfig>) -> Outcome {
    let mut client = ClientConnection::new(client.clone(), name).unwrap();
    let mut server = ServerConnection::new(server.clone()).unwrap();
    let (mut client_error, mut server_error) = (None, None);
    loop {
        let mut buffer = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut buffer).unwrap();
        }
        let quiet = buffer.is_empty();
        let mut bytes = buffer.as_slice();
        while !bytes.is_empty() {
            server.read_tls(&mut bytes).unwrap();
            // The first error counts; later packets of a failed connection do not matter.
            server_error = server_error.or(server.process_new_packets().err());
        }
        buffer.clear();
        while server.wants_write() {
            server.write_tls(&mut buffer).unwrap();
        }
        if quiet && buffer.is_empty() {
            break;
        }
        let mut bytes = buffer.as_slice();
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).unwrap();
            client_error = client_error.or(client.process_new_packets().err());
        }
    }
    Outcome {
        client: client_error.map_or(Ok(client), |error| Err(PeerRefusal::from(&error))),
        server: server_error.map_or(Ok(server), |error| Err(PeerRefusal::from(&error))),
    }
}

fn dial(client: &Node, source: &str, destination: &str, server: &Node) -> Outcome {
    shake(&client.dials(source, destination), server_name(&id(destination)), &server.identities.server_config())
}
