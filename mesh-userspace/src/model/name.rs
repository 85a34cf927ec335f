//! Names of objects and nodes: DNS labels, as in Kubernetes.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a valid name: {reason}")]
pub struct InvalidName {
    name: String,
    reason: &'static str,
}

/// Checks RFC 1123 subdomain rules: lower-case letters, digits, `-` and `.`, alphanumeric at both ends, 253 at most.
fn check(name: &str) -> Result<(), InvalidName> {
    let refuse = |reason| Err(InvalidName { name: name.chars().take(64).collect(), reason });
    if name.is_empty() {
        return refuse("it is empty");
    }
    if name.len() > 253 {
        return refuse("it is longer than 253 characters");
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.') {
        return refuse("use lower-case letters, digits, '-' and '.' only");
    }
    let labels_are_sound = name
        .split('.')
        .all(|label| !label.is_empty() && label.len() <= 63 && !label.starts_with('-') && !label.ends_with('-'));
    if !labels_are_sound {
        return refuse("each part between dots has 1 to 63 characters and starts and ends with a letter or digit");
    }
    Ok(())
}

/// A namespaced object's name. Cheap to clone, and so is its text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ObjectName {
    /// `namespace/name`.
    text: Arc<str>,
    /// Length of the namespace.
    namespace: usize,
}

impl ObjectName {
    /// # Errors
    /// If either part is no RFC 1123 name.
    pub fn parse(namespace: &str, name: &str) -> Result<Self, InvalidName> {
        check(namespace)?;
        check(name)?;
        Ok(Self { text: format!("{namespace}/{name}").into(), namespace: namespace.len() })
    }

    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.text[..self.namespace]
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.text[self.namespace + 1..]
    }

    /// `namespace/name`.
    #[must_use]
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }
}

impl Ord for ObjectName {
    /// By namespace, then by name: `/` sorts after `-` and `.`, so the text alone would mix namespaces.
    fn cmp(&self, other: &Self) -> Ordering {
        (self.namespace(), self.name()).cmp(&(other.namespace(), other.name()))
    }
}

impl PartialOrd for ObjectName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// # Errors
    /// If it is no RFC 1123 name.
    pub fn parse(name: &str) -> Result<Self, InvalidName> {
        check(name)?;
        Ok(Self(name.into()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn text(&self) -> &Arc<str> {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_two_parts_and_sorts_by_the_first() {
        let name = |namespace, name| ObjectName::parse(namespace, name).unwrap();
        let cart = name("shop.eu", "cart-1");
        assert_eq!((cart.namespace(), cart.name(), &**cart.text()), ("shop.eu", "cart-1", "shop.eu/cart-1"));
        assert_eq!(cart.to_string(), "shop.eu/cart-1");
        let mut names = [name("a-b", "x"), name("a", "z"), name("a.c", "x"), name("a", "b")];
        names.sort();
        assert_eq!(names.map(|name| name.to_string()), ["a/b", "a/z", "a-b/x", "a.c/x"]);
    }

    #[test]
    fn names_follow_rfc_1123() {
        for good in ["a", "web-1", "a.b", "0"] {
            assert!(NodeName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "-a", "a-", "a..b", "a_b", "a/b", &"x".repeat(64), &"x.".repeat(130)] {
            assert!(NodeName::parse(bad).is_err(), "{bad}");
        }
    }
}
