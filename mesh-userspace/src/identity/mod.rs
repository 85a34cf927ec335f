//! Who a workload is, and how two of them prove it: certificates on disk, a small CA that writes them, and the TLS
//! configurations made of them.
//!
//! Each side checks the other's exact identity: a client accepts one SPIFFE ID only (its configuration is made for one
//! pair of identities), a server accepts any identity of its trust domain and hands it to policy. The server's
//! certificate is picked by the name that the client asks for ([`server_name`]); a name of no local identity ends the
//! handshake.

pub(crate) mod certificate;
mod error;
pub(crate) mod files;
mod identities;
mod material;
mod name;
mod refusal;
mod sessions;
mod source;
pub(crate) mod tls;
mod verify;

#[cfg(test)]
mod handshake_tests;

pub use certificate::{Certificate, peer_identity};
pub use error::IdentityError;
pub use identities::Identities;
pub use name::server_name;
pub use refusal::PeerRefusal;
pub use source::{Answer, CertificateSource, SignedChain, SigningRequest, SourceError, TrustBundle};

/// The application protocol that both sides of a tunnel agree on.
pub const ALPN: &[u8] = b"nodemesh/1";
