//! What a pod's namespace needs so that the daemon may speak to the application with the client's address: the
//! application's answers, which go to an address elsewhere, must come back to a socket in the same namespace.
//!
//! The daemon's packets carry [`MARK`]. With `net.ipv4.tcp_fwmark_accept` the application's accepted socket takes the
//! mark of the connection request (IPv6 too); a rule sends what is marked to [`TABLE`], where every address is local.

use super::alias;
use super::netlink::{Change, Family, LocalDefault, Netlink, Rule};
use std::io;

/// `SO_MARK` of the daemon's sockets in pods' namespaces.
pub const MARK: u32 = 0x539;
/// The routing table, in pods' namespaces, in which every address is local.
pub const TABLE: u32 = 1337;

/// Marks rules and routes as ours (`proto` in iproute2), so that those of a killed predecessor are known too, and
/// nothing else is ever removed. Not one of the kernel's or a routing daemon's numbers.
pub(super) const TAG: u8 = 139;
/// Before the main table's rule and what network plugins add, after the local table's.
const RULE: Rule = Rule { priority: 100, mark: MARK, table: TABLE, tag: TAG };
const ROUTE: LocalDefault = LocalDefault { table: TABLE, tag: TAG };

/// A sysctl of the namespace, what it must be, and the kernel's default for it.
struct Setting {
    path: &'static str,
    on: &'static str,
    default: &'static str,
}

const SETTINGS: [Setting; 4] = [
    // Answers to a marked connection request carry its mark, so that they find the local route.
    Setting { path: "/proc/sys/net/ipv4/tcp_fwmark_accept", on: "1", default: "0" },
    // So does the kernel's RST where nothing listens: it would go to the client's own address elsewhere instead, and
    // the daemon would wait in vain.
    Setting { path: "/proc/sys/net/ipv4/fwmark_reflect", on: "1", default: "0" },
    Setting { path: "/proc/sys/net/ipv6/fwmark_reflect", on: "1", default: "0" },
    // All captured connections of a workload end at one address and port, so they share one range of source ports;
    // without this a workload that closes first runs out of them at about 470 new connections a second (ADR 0001).
    Setting { path: "/proc/sys/net/ipv4/tcp_tw_reuse", on: "1", default: "2" },
];

/// Who changed each of [`SETTINGS`], as far as [`prepare`] can tell.
pub(super) type Sysctls = [Sysctl; SETTINGS.len()];

/// Who changed a sysctl.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sysctl {
    /// Perhaps an earlier daemon, if it has left more than the sysctl.
    #[default]
    Unknown,
    /// This call.
    Ours,
    /// Somebody else: it was as it must be, and no daemon has been here.
    Foreign,
}

/// Prepares this thread's namespace; harmless if that was done already, by this or an earlier daemon.
pub(super) fn prepare() -> io::Result<Sysctls> {
    let netlink = Netlink::open().map_err(|error| explain(&error, "cannot open netlink"))?;
    // First, because it is what tells a later daemon that this one has been here.
    let new = add(Family::V4, "rule", || netlink.rule(Change::Add, Family::V4, RULE))?;
    add(Family::V4, "route", || netlink.local_default(Change::Add, Family::V4, ROUTE))?;
    add(Family::V6, "rule", || netlink.rule(Change::Add, Family::V6, RULE))?;
    add(Family::V6, "route", || netlink.local_default(Change::Add, Family::V6, ROUTE))?;
    let mut sysctls = Sysctls::default();
    for (setting, sysctl) in SETTINGS.iter().zip(&mut sysctls) {
        *sysctl = match (setting.is_on()?, new) {
            (Some(false), _) => {
                setting.write(setting.on)?;
                Sysctl::Ours
            }
            (Some(true), true) | (None, _) => Sysctl::Foreign,
            (Some(true), false) => Sysctl::Unknown,
        };
    }
    Ok(sysctls)
}

/// Removes what [`prepare`] added, and nothing else, from this thread's namespace; harmless if nothing is there.
pub(super) fn restore(sysctls: Sysctls) -> io::Result<()> {
    let netlink = Netlink::open().map_err(|error| explain(&error, "cannot open netlink"))?;
    // The reverse order: the rule that tells of us goes last.
    alias::remove_all(&netlink)?;
    remove(Family::V6, "route", || netlink.local_default(Change::Remove, Family::V6, ROUTE))?;
    remove(Family::V6, "rule", || netlink.rule(Change::Remove, Family::V6, RULE))?;
    let was_prepared = remove(Family::V4, "route", || netlink.local_default(Change::Remove, Family::V4, ROUTE))?;
    for (setting, sysctl) in SETTINGS.iter().zip(sysctls) {
        let is_ours = sysctl == Sysctl::Ours || (sysctl == Sysctl::Unknown && was_prepared);
        if is_ours && setting.is_on()?.is_some() {
            setting.write(setting.default)?;
        }
    }
    remove(Family::V4, "rule", || netlink.rule(Change::Remove, Family::V4, RULE))?;
    Ok(())
}

/// Whether it was added; `false` if it was there.
fn add(family: Family, what: &str, request: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
    match request() {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EEXIST) => Ok(false),
            _ if family == Family::V6 && lacks_ipv6(&error) => Ok(false),
            Some(libc::ENETDOWN) => Err(explain(&error, "cannot add a local route: bring the namespace's `lo` up")),
            _ => Err(explain(&error, &format!("cannot add the {family:?} {what} of table {TABLE}"))),
        },
    }
}

/// Whether it was removed; `false` if it was not there.
fn remove(family: Family, what: &str, request: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
    match request() {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Ok(false),
            _ if family == Family::V6 && lacks_ipv6(&error) => Ok(false),
            _ => Err(explain(&error, &format!("cannot remove the {family:?} {what} of table {TABLE}"))),
        },
    }
}

/// A kernel without IPv6, or a namespace in which it is disabled (EACCES for routes): there is nothing to route then.
pub(super) fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EACCES))
}

impl Setting {
    /// `None` if this kernel does not have it: one without IPv6 lacks the latter's.
    fn is_on(&self) -> io::Result<Option<bool>> {
        match std::fs::read_to_string(self.path) {
            Ok(value) => Ok(Some(value.trim() == self.on)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.path.contains("/ipv6/") => Ok(None),
            Err(error) => Err(explain(&error, self.path)),
        }
    }

    fn write(&self, value: &str) -> io::Result<()> {
        std::fs::write(self.path, value).map_err(|error| explain(&error, self.path))
    }
}

pub(super) fn explain(error: &io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
