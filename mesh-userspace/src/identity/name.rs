//! The name under which a client asks a server for an identity.

use crate::model::SpiffeId;
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::crypto::hash::Output;
use rustls_pki_types::{DnsName, ServerName};
use std::fmt::Write;

/// The DNS name (SNI) that stands for an identity: a hash, because a SPIFFE ID may be longer than a DNS name and the
/// name travels in clear. A server finds the identity by looking its own up; nobody trusts the name.
///
/// # Panics
/// Never: the result is a DNS name by construction.
#[must_use]
pub fn server_name(destination: &SpiffeId) -> ServerName<'static> {
    ServerName::DnsName(DnsName::try_from(label(destination)).expect("hexadecimal labels make a DNS name"))
}

/// [`server_name`] as text.
pub(super) fn label(id: &SpiffeId) -> String {
    let digest = sha256(id.as_str().as_bytes());
    let mut name = String::with_capacity(80);
    for (index, byte) in digest.as_ref().iter().enumerate() {
        // A label has 63 characters at most, the digest 64.
        if index == 16 {
            name.push('.');
        }
        write!(name, "{byte:02x}").expect("writing to a String");
    }
    name.push_str(".nodemesh.internal");
    name
}

pub(super) fn sha256(bytes: &[u8]) -> Output {
    let suite = TLS13_AES_128_GCM_SHA256.tls13().expect("it is a TLS 1.3 suite");
    suite.common.hash_provider.hash(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_identity_has_one_stable_name() {
        let id = |uri| SpiffeId::parse(uri).unwrap();
        let name = server_name(&id("spiffe://example.org/ns/shop/sa/cart"));
        // Nodes of different versions must agree on it.
        assert_eq!(
            name.to_str(),
            "2b1a4a837fb8724e56e67264d7d6a04c.fa72abc91564b6d60717f1f0faee264f.nodemesh.internal"
        );
        assert_ne!(name, server_name(&id("spiffe://example.org/ns/shop/sa/cart2")));
        let long = format!("spiffe://{}/ns/{}/sa/a", "t".repeat(255), "n.".repeat(126) + "n");
        assert!(server_name(&id(&long)).to_str().len() <= 253);
    }
}
