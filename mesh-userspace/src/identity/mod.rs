//! Who a workload is, and how two of them prove it: certificates from files or an authority, renewed in time, and the TLS
//! configurations made of them.
//!
//! Each side checks the other's exact identity: a client accepts one SPIFFE ID only (its configuration is made for one
//! pair of identities), a server accepts any identity of its trust domain and hands it to policy. The server's
//! certificate is picked by the name that the client asks for ([`server_name`]); a name of no local identity ends the
//! handshake.

mod bundle;
pub(crate) mod certificate;
mod error;
pub(crate) mod files;
mod generation;
mod identities;
mod issuer;
mod locals;
mod material;
mod name;
mod refusal;
mod renewal;
mod request;
mod sessions;
mod source;
mod status;
pub(crate) mod tls;
mod verify;

#[cfg(test)]
mod handshake_tests;
#[cfg(test)]
mod scripted_source;

pub use bundle::Root;
pub use certificate::{Certificate, expiry, peer_identity, pem};
pub use error::IdentityError;
pub use identities::{Identities, Orders};
pub use issuer::Issuer;
pub use name::server_name;
pub use refusal::PeerRefusal;
pub use source::{Answer, CertificateSource, SignedChain, SigningRequest, SourceError, TrustBundle};
pub use status::{CertificateStatus, Issuance, State};

/// The application protocol that both sides of a tunnel agree on.
pub const ALPN: &[u8] = b"nodemesh/1";
