//! SPIFFE identities: `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.

use super::ObjectName;
use std::fmt;
use std::sync::Arc;

/// Why a string is no identity of this mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{id:?} is not a SPIFFE ID of the form spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>: {reason}")]
pub struct InvalidSpiffeId {
    id: String,
    reason: &'static str,
}

/// A trust domain: the authority part of a SPIFFE ID.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// # Errors
    /// If it holds other characters than lower-case letters, digits, `-`, `_` and `.`, or is longer than 255.
    pub fn parse(name: &str) -> Result<Self, InvalidSpiffeId> {
        let sound = !name.is_empty()
            && name.len() <= 255
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.'));
        if sound {
            Ok(Self(name.into()))
        } else {
            Err(refuse(name, "the trust domain has 1 to 255 lower-case letters, digits, '-', '_' or '.'"))
        }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A workload's identity. Cheap to clone, compared whole.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// Length of the trust domain, right after `spiffe://`.
    trust_domain: usize,
    /// Length of the namespace, right after `/ns/`.
    namespace: usize,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// Builds the identity of a service account.
    ///
    /// # Errors
    /// If the name is too long for a SPIFFE ID (2048 bytes); its parts were checked before.
    pub fn for_service_account(trust_domain: &TrustDomain, account: &ObjectName) -> Result<Self, InvalidSpiffeId> {
        Self::parse(&format!("{SCHEME}{trust_domain}/ns/{}/sa/{}", account.namespace(), account.name()))
    }

    /// # Errors
    /// If it is not exactly of the form that the mesh issues: no query, fragment, port, user, percent escape or
    /// trailing slash.
    pub fn parse(uri: &str) -> Result<Self, InvalidSpiffeId> {
        if uri.len() > 2048 {
            return Err(refuse(uri, "it is longer than 2048 bytes"));
        }
        let rest = uri.strip_prefix(SCHEME).ok_or_else(|| refuse(uri, "it does not start with spiffe://"))?;
        let mut parts = rest.split('/');
        let trust_domain = parts.next().unwrap_or_default();
        TrustDomain::parse(trust_domain)?;
        let shape = [parts.next(), parts.next(), parts.next(), parts.next(), parts.next()];
        let [Some("ns"), Some(namespace), Some("sa"), Some(account), None] = shape else {
            return Err(refuse(uri, "the path is not /ns/<namespace>/sa/<service-account>"));
        };
        ObjectName::parse(namespace, account)
            .map_err(|_| refuse(uri, "namespace or service account is no DNS name"))?;
        Ok(Self { uri: uri.into(), trust_domain: trust_domain.len(), namespace: namespace.len() })
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    #[must_use]
    pub fn text(&self) -> &Arc<str> {
        &self.uri
    }

    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..SCHEME.len() + self.trust_domain]
    }

    #[must_use]
    pub fn namespace(&self) -> &str {
        let start = SCHEME.len() + self.trust_domain + "/ns/".len();
        &self.uri[start..start + self.namespace]
    }

    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.uri[SCHEME.len() + self.trust_domain + "/ns/".len() + self.namespace + "/sa/".len()..]
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn refuse(id: &str, reason: &'static str) -> InvalidSpiffeId {
    InvalidSpiffeId { id: id.chars().take(128).collect(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_gives_back_its_parts() {
        let id = SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap();
        assert_eq!((id.trust_domain(), id.namespace(), id.service_account()), ("example.org", "shop", "cart"));
    }

    #[test]
    fn look_alikes_are_refused() {
        for bad in [
            "",
            "spiffe://",
            "spiffe://example.org",
            "spiffe://example.org/",
            "spiffe://example.org/ns/shop/sa/cart/",
            "spiffe://example.org/ns/shop/sa/cart/x",
            "spiffe://example.org/ns//sa/cart",
            "spiffe://Example.org/ns/shop/sa/cart",
            "spiffe://example.org:443/ns/shop/sa/cart",
            "spiffe://user@example.org/ns/shop/sa/cart",
            "spiffe://example.org/ns/shop/sa/cart?x",
            "spiffe://example.org/ns/shop/sa/ca%72t",
            "SPIFFE://example.org/ns/shop/sa/cart",
            "https://example.org/ns/shop/sa/cart",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad}");
        }
    }
}
