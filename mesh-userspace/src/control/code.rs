//! The stable codes of what can be wrong with a catalog. A code never changes its meaning and is never reused.

use serde::{Serialize, Serializer};
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something named cannot be as it is written: an object (its last good version stays) or what it refers to.
    Error,
    /// Works as written, which is likely not what was meant.
    Warning,
}

impl Severity {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

macro_rules! codes {
    ($( $name:ident = $text:literal, $severity:ident, $title:literal; )*) => {
        /// What is wrong; each code has one severity. docs/CATALOG.md explains them all.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $( #[doc = $title] $name, )*
        }

        impl Code {
            /// Every code, in the order of its number.
            pub const ALL: &[Self] = &[$( Self::$name, )*];

            /// The code as users see it, as in `M0203`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$name => $text, )* }
            }

            #[must_use]
            pub const fn severity(self) -> Severity {
                match self { $( Self::$name => Severity::$severity, )* }
            }

            /// The code's meaning in a few words.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $( Self::$name => $title, )* }
            }
        }
    };
}

codes! {
    Directory = "M0100", Error, "the catalog directory cannot be read";
    Unreadable = "M0101", Error, "the file cannot be read";
    TooLarge = "M0102", Error, "the file is too large";
    NotText = "M0103", Error, "the file is not UTF-8 text";
    Syntax = "M0104", Error, "the document is not valid YAML";
    Empty = "M0105", Error, "the file is empty";
    Limit = "M0106", Error, "the document exceeds a limit";
    DuplicateKey = "M0107", Error, "a key appears twice in one mapping";
    Unsupported = "M0108", Error, "the document uses a YAML feature that catalogs do not have";
    TooManyFindings = "M0109", Warning, "further findings are not shown";
    NotAnObject = "M0201", Error, "the document is no object";
    UnknownKind = "M0202", Error, "the object's apiVersion and kind are not known";
    UnknownField = "M0203", Error, "the object has a field that its kind does not have";
    MissingField = "M0204", Error, "a required field is missing";
    WrongType = "M0205", Error, "the value has the wrong type";
    InvalidValue = "M0206", Error, "the value is not one of those allowed";
    InvalidName = "M0207", Error, "the name is not a valid name";
    InvalidAddress = "M0208", Error, "the IP address is not valid or not usable here";
    InvalidRange = "M0209", Error, "the address range is not valid";
    OutOfRange = "M0210", Error, "the number is out of range";
    AddressCount = "M0211", Error, "there are too many addresses, or none";
    DuplicatePort = "M0212", Error, "a service's port or port name appears twice";
    NotCaptured = "M0213", Warning, "the port is accepted but not captured in this version";
    ApplicationLevel = "M0214", Error, "rules about requests are not in this version";
    InvalidPattern = "M0215", Error, "the SPIFFE ID or pattern is not valid";
    DuplicateRule = "M0216", Error, "two rules of a policy have one name";
    NoRules = "M0217", Warning, "the policy has no rules";
    NoSources = "M0218", Warning, "the rule's list of sources is empty and matches nobody";
    Exclusive = "M0219", Error, "the field does not go with another one";
    NoDeclaredPort = "M0220", Error, "a host-network workload declares no port";
    PolicyOfNowhere = "M0221", Error, "a broken policy does not say its namespace and protects nothing";
    InvalidDuration = "M0222", Error, "the duration is not valid or out of range";
    DuplicateObject = "M0301", Error, "the object is defined twice";
    TwoMeshConfigs = "M0302", Error, "there is more than one MeshConfig";
    NoMeshConfig = "M0303", Error, "there is no MeshConfig";
    UnknownNode = "M0304", Error, "the workload's node is not in the catalog";
    SelectsNothing = "M0305", Warning, "the service selects no workload";
    UnknownTargetPort = "M0306", Error, "no selected workload has a port of this name";
    DuplicateFrontend = "M0307", Error, "two services claim one virtual address and port";
    DuplicateAddress = "M0308", Error, "two workloads claim one address";
    ExcludedFrontend = "M0309", Warning, "the virtual address lies in an excluded range";
    ExcludedWorkload = "M0310", Warning, "the workload's address lies in an excluded range";
    FrontendIsWorkload = "M0311", Error, "a virtual address is a workload's address";
    DuplicateUid = "M0312", Error, "two workloads have one uid";
    NotMeshed = "M0313", Warning, "a selected workload is not in the mesh and takes no connections";
    NodeWithoutAddress = "M0314", Warning, "the node has no usable InternalIP address";
    SomeLackTargetPort = "M0315", Warning, "some selected workloads have no port of this name";
    NoEndpointOfFamily = "M0316", Warning, "no selected workload has an address of this family";
    DuplicateNodeAddress = "M0317", Error, "two nodes have one address";
    ForeignTrustDomain = "M0318", Error, "the pattern is of another trust domain and never matches";
    TargetsNothing = "M0319", Warning, "the policy's target is no workload";
    UnknownService = "M0320", Error, "the policy's target is no service of its namespace";
    StandsIn = "M0321", Error, "a broken object without a good version is in force in its strictest form";
    DuplicateHostPort = "M0322", Error, "two host-network workloads of a node declare one port";
    DuplicateCgroup = "M0323", Error, "two host-network workloads of a node have one cgroup";
    NotNodeAddress = "M0324", Warning, "a host-network workload's address is not one of its node";
    NotTargetedPort = "M0325", Warning, "the rule's port is none that the target service leads to";
    UnknownAccount = "M0326", Warning, "no workload has the service account that the rule names";
    DuplicateTraffic = "M0327", Error, "two traffic policies are for one service";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_sorted_and_documented() {
        let reference = include_str!("../../../docs/CATALOG.md");
        assert!(Code::ALL.windows(2).all(|pair| pair[0].as_str() < pair[1].as_str()));
        for code in Code::ALL {
            let row = format!("| {code} | {} | {} |", code.severity().as_str(), code.title());
            assert!(reference.contains(&row), "docs/CATALOG.md has no row that starts {row:?}");
        }
    }
}
