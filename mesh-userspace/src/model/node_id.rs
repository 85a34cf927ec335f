//! SPIFFE IDs of the mesh's own parts: `spiffe://<trust-domain>/node/<name>` and `spiffe://<trust-domain>/ca`. Neither
//! is ever a workload's identity, and no workload's identity is one of these.

use super::{NodeName, TrustDomain};
use std::fmt;

const SCHEME: &str = "spiffe://";

/// A node's identity: what its daemon proves to the certificate authority, and nowhere else.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId {
    trust_domain: TrustDomain,
    node: NodeName,
}

impl NodeId {
    #[must_use]
    pub fn new(trust_domain: TrustDomain, node: NodeName) -> Self {
        Self { trust_domain, node }
    }

    /// The node that a URI names; `None` unless it is exactly of the form that the mesh issues.
    #[must_use]
    pub fn parse(uri: &str) -> Option<Self> {
        let (trust_domain, path) = uri.strip_prefix(SCHEME)?.split_once('/')?;
        let node = path.strip_prefix("node/")?;
        Some(Self { trust_domain: TrustDomain::parse(trust_domain).ok()?, node: NodeName::parse(node).ok()? })
    }

    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The identity of a trust domain's certificate authority.
    #[must_use]
    pub fn of_authority(trust_domain: &TrustDomain) -> String {
        format!("{SCHEME}{trust_domain}/ca")
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/node/{}", self.trust_domain, self.node)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SpiffeId;

    #[test]
    fn nodes_and_workloads_are_never_taken_for_each_other() {
        let node = "spiffe://example.org/node/n1";
        assert_eq!(NodeId::parse(node).unwrap().to_string(), node);
        assert!(SpiffeId::parse(node).is_err());
        for other in [
            "spiffe://example.org/ns/shop/sa/cart",
            "spiffe://example.org/ca",
            "spiffe://example.org/node/",
            "spiffe://example.org/node/n1/",
            "spiffe://example.org/node/n1/x",
            "spiffe://example.org/node/N1",
            "spiffe://example.org//node/n1",
            "spiffe://example.org:1/node/n1",
            "spiffe:///node/n1",
            "SPIFFE://example.org/node/n1",
            "",
        ] {
            assert!(NodeId::parse(other).is_none(), "{other}");
        }
    }
}
