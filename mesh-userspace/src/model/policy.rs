//! Authorization policies: who may connect to which workloads.

use super::{ObjectName, SpiffeId};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// What happens to connections that no policy decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DefaultAction {
    #[default]
    Allow,
    Deny,
}

/// What a connect() that policy denies fails with, where the source's kernel refuses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeniedError {
    /// `EACCES`: says that it was policy.
    #[default]
    AccessDenied,
    /// `ECONNREFUSED`: looks like a closed port.
    ConnectionRefused,
}

/// What a policy does with connections that one of its rules matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyAction {
    /// Lets them pass; with such a policy on a workload, what no rule allows is denied.
    Allow,
    /// Refuses them, whatever other policies allow.
    Deny,
    /// Reports them.
    Audit,
}

impl PolicyAction {
    /// As catalogs write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
        }
    }
}

/// `nodemesh.io/v1alpha1 AuthorizationPolicy`. It applies to workloads of its own namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    pub name: ObjectName,
    /// Any of these; empty: every workload of the namespace.
    pub targets: Vec<PolicyTarget>,
    pub action: PolicyAction,
    /// Reported, not enforced.
    pub dry_run: bool,
    /// Any of these. Without rules nothing matches: an ALLOW policy then denies everything.
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyTarget {
    /// Workloads whose labels contain all of these.
    Selector(BTreeMap<String, String>),
    /// Workloads that this service (of the policy's namespace) selects, on the ports that it targets.
    Service(Arc<str>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// As written, or its index in the policy.
    pub name: Arc<str>,
    /// Any of these; `None`: everyone, also callers without an identity. An empty list matches nobody.
    pub sources: Option<Vec<Source>>,
    /// The workload's ports; empty: all.
    pub ports: Vec<u16>,
}

/// One way in which a rule recognises a caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A service account of the mesh's trust domain; without a name every one of the namespace.
    ServiceAccount { namespace: Arc<str>, name: Option<Arc<str>> },
    /// A SPIFFE ID, perhaps with wildcards.
    Spiffe(SpiffePattern),
    /// Any identity of a namespace.
    Namespace(Arc<str>),
    /// The caller's address, with or without an identity.
    Range(IpNet),
}

impl Source {
    /// Whether it recognises a proven identity.
    #[must_use]
    pub fn matches_identity(&self, id: &SpiffeId) -> bool {
        match self {
            Self::ServiceAccount { namespace, name } => {
                id.namespace() == &**namespace && name.as_deref().is_none_or(|name| id.service_account() == name)
            }
            Self::Namespace(namespace) => id.namespace() == &**namespace,
            Self::Spiffe(pattern) => pattern.matches(id),
            Self::Range(_) => false,
        }
    }
}

/// Why a text is no pattern of identities.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no pattern of SPIFFE IDs: write spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>; namespace \
     and service account may have one `*` each, which stands for any characters, and the whole may be `*`"
)]
pub struct InvalidSpiffePattern(pub String);

/// `spiffe://<trust-domain>/ns/<glob>/sa/<glob>`, or `*` for every identity of the mesh. A glob has at most one `*`,
/// which stands for any number of characters other than `/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SpiffePattern(Pattern);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Pattern {
    Any,
    Parts { trust_domain: Arc<str>, namespace: Glob, account: Glob },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Glob {
    Exactly(Arc<str>),
    Around { prefix: Arc<str>, suffix: Arc<str> },
}

impl SpiffePattern {
    /// # Errors
    /// If it has another form, or what it says could never be an identity.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffePattern> {
        if text == "*" {
            return Ok(Self(Pattern::Any));
        }
        // With each wildcard replaced by a letter it must be an identity: nothing that never matches is accepted.
        let refuse = || InvalidSpiffePattern(text.chars().take(128).collect());
        let sample = SpiffeId::parse(&text.replace('*', "x")).map_err(|_| refuse())?;
        let rest = text.strip_prefix("spiffe://").ok_or_else(refuse)?;
        let mut parts = rest.split('/');
        let (trust_domain, _, namespace, _, account) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next());
        let (Some(trust_domain), Some(namespace), Some(account)) = (trust_domain, namespace, account) else {
            return Err(refuse());
        };
        if trust_domain != sample.trust_domain() || rest.matches("/ns/").count() == 0 {
            return Err(refuse());
        }
        let (namespace, account) =
            (Glob::parse(namespace).ok_or_else(refuse)?, Glob::parse(account).ok_or_else(refuse)?);
        Ok(Self(Pattern::Parts { trust_domain: trust_domain.into(), namespace, account }))
    }

    #[must_use]
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match &self.0 {
            Pattern::Any => true,
            Pattern::Parts { trust_domain, namespace, account } => {
                id.trust_domain() == &**trust_domain
                    && namespace.matches(id.namespace())
                    && account.matches(id.service_account())
            }
        }
    }

    /// The one trust domain whose identities it may match; `None` for `*`.
    #[must_use]
    pub fn trust_domain(&self) -> Option<&str> {
        match &self.0 {
            Pattern::Any => None,
            Pattern::Parts { trust_domain, .. } => Some(trust_domain),
        }
    }

    /// Whether it matches every identity.
    #[must_use]
    pub fn is_any(&self) -> bool {
        matches!(self.0, Pattern::Any)
    }
}

impl fmt::Display for SpiffePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Pattern::Any => f.write_str("*"),
            Pattern::Parts { trust_domain, namespace, account } => {
                write!(f, "spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
            }
        }
    }
}

impl Glob {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once('*') {
            None => Some(Self::Exactly(text.into())),
            Some((_, suffix)) if suffix.contains('*') => None,
            Some((prefix, suffix)) => Some(Self::Around { prefix: prefix.into(), suffix: suffix.into() }),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exactly(exactly) => &**exactly == text,
            Self::Around { prefix, suffix } => {
                text.len() >= prefix.len() + suffix.len() && text.starts_with(&**prefix) && text.ends_with(&**suffix)
            }
        }
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(text) => f.write_str(text),
            Self::Around { prefix, suffix } => write!(f, "{prefix}*{suffix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(uri: &str) -> SpiffeId {
        SpiffeId::parse(uri).unwrap()
    }

    #[test]
    fn a_pattern_matches_whole_parts_of_one_trust_domain() {
        let cart = id("spiffe://example.org/ns/shop/sa/cart");
        for matching in [
            "*",
            "spiffe://example.org/ns/shop/sa/cart",
            "spiffe://example.org/ns/*/sa/cart",
            "spiffe://example.org/ns/shop/sa/*",
            "spiffe://example.org/ns/sh*p/sa/c*",
        ] {
            let pattern = SpiffePattern::parse(matching).unwrap();
            assert!(pattern.matches(&cart), "{matching}");
            assert_eq!(pattern.to_string(), matching);
        }
        for other in [
            "spiffe://example.com/ns/shop/sa/cart",
            "spiffe://example.org/ns/shop/sa/car",
            "spiffe://example.org/ns/shop/sa/cart*t",
            "spiffe://example.org/ns/shopp*/sa/cart",
        ] {
            assert!(!SpiffePattern::parse(other).unwrap().matches(&cart), "{other}");
        }
    }

    #[test]
    fn what_could_never_match_is_no_pattern() {
        for bad in [
            "",
            "**",
            "spiffe://*/ns/shop/sa/cart",
            "spiffe://example.org/*",
            "spiffe://example.org/ns/a*b*c/sa/cart",
            "spiffe://example.org/ns/shop/sa/cart/*",
            "spiffe://example.org/*/shop/sa/cart",
            "spiffe://example.org/ns/Shop/sa/*",
            "example.org/ns/shop/sa/cart",
        ] {
            assert!(SpiffePattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn service_accounts_and_namespaces_are_matched_whole() {
        let cart = id("spiffe://example.org/ns/shop/sa/cart");
        let account =
            |name: Option<&str>| Source::ServiceAccount { namespace: "shop".into(), name: name.map(Into::into) };
        assert!(account(Some("cart")).matches_identity(&cart));
        assert!(account(None).matches_identity(&cart));
        assert!(!account(Some("car")).matches_identity(&cart));
        assert!(Source::Namespace("shop".into()).matches_identity(&cart));
        assert!(!Source::Namespace("sho".into()).matches_identity(&cart));
        assert!(!Source::Range("0.0.0.0/0".parse().unwrap()).matches_identity(&cart));
    }
}
