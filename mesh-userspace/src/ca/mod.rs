//! The built-in certificate authority, both sides of it: the authority with its store, its keys and its server, and
//! the client with which a node joins and asks for certificates.
//!
//! Root -> intermediate -> leaf. A node joins with a token, once, and proves itself with its own certificate ever
//! after; it may ask for the identities of the workloads that the catalog places on it, and for nothing else. See
//! docs/OPERATIONS.md for what people do with it.

mod authority;
mod certificate;
mod client;
pub mod csr;
mod digest;
mod error;
mod key;
mod limit;
mod records;
mod refusal;
mod rotation;
mod routes;
mod server;
mod service;
mod store;
mod tls;
mod token;
mod wire;

pub use authority::{
    Authority, DEFAULT_TOKEN_TTL, Issued, IssuerStatus, Joined, MAX_TOKEN_TTL, NewToken, NodeStatus, Rotate,
    RotationStatus, Status, TokenStatus, init, issue,
};
pub use certificate::{BACK_DATED, DEFAULT_NODE_TTL, DEFAULT_TTL, MAX_TTL, Validity};
pub use client::{CaClient, DEFAULT_TIMEOUT, JoinError, Membership, enrol, is_member, join};
pub use digest::Digest;
pub use error::CaError;
pub use refusal::{Reason, Refusal};
pub use rotation::Lives;
pub use server::{DEFAULT_PORT, Server};
pub use service::{Placement, Service};
pub use token::{InvalidToken, Token, TokenId};

#[cfg(test)]
mod tests;
