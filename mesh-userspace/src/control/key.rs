//! What tells the documents of a catalog apart.

use crate::model::ObjectKey;
use std::fmt;
use std::sync::Arc;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Key {
    Object(ObjectKey),
    /// Not an object of its own: it is only read for what its workloads do not say themselves.
    Namespace(Arc<str>),
}

impl Key {
    pub(super) fn is_policy(&self) -> bool {
        matches!(self, Self::Object(ObjectKey::Policy(_)))
    }

    /// Of an object that has one, its namespace.
    pub(super) fn namespace(&self) -> Option<&str> {
        match self {
            Self::Object(
                ObjectKey::Service(name)
                | ObjectKey::Workload(name)
                | ObjectKey::Policy(name)
                | ObjectKey::Traffic(name),
            ) => Some(name.namespace()),
            Self::Object(ObjectKey::Mesh | ObjectKey::Node(_)) | Self::Namespace(_) => None,
        }
    }
}

impl From<ObjectKey> for Key {
    fn from(key: ObjectKey) -> Self {
        Self::Object(key)
    }
}

/// Kind and name, as in `Service shop/cart`.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(ObjectKey::Mesh) => f.write_str("MeshConfig"),
            Self::Object(ObjectKey::Node(name)) => write!(f, "Node {name}"),
            Self::Object(ObjectKey::Service(name)) => write!(f, "Service {name}"),
            Self::Object(ObjectKey::Workload(name)) => write!(f, "WorkloadEntry {name}"),
            Self::Object(ObjectKey::Policy(name)) => write!(f, "AuthorizationPolicy {name}"),
            Self::Object(ObjectKey::Traffic(name)) => write!(f, "TrafficPolicy {name}"),
            Self::Namespace(name) => write!(f, "Namespace {name}"),
        }
    }
}
