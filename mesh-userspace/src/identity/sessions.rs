//! Resumable sessions: a client's with one destination identity, a server's with all its clients. None outlives the
//! certificates that it rests on.

use super::locals::Locals;
use arc_swap::ArcSwap;
use rustls::NamedGroup;
use rustls::client::{ClientSessionMemoryCache, ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::server::{ServerSessionMemoryCache, StoresServerSessions};
use rustls_pki_types::{ServerName, UnixTime};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use time::OffsetDateTime;

/// Tickets of one pair of identities. Resuming skips the check of the server's certificate, so tickets are given out
/// only while each certificate that they may rest on is still valid.
pub(super) struct PairSessions {
    tickets: ClientSessionMemoryCache,
    /// The end of the certificate that the client presents.
    own_not_after: OffsetDateTime,
    /// Seconds since 1970.
    valid_until: AtomicI64,
}

impl PairSessions {
    pub(super) fn new(own_not_after: OffsetDateTime) -> Self {
        // One server name, the pair's; rustls keeps 8 tickets of it.
        Self { tickets: ClientSessionMemoryCache::new(1), own_not_after, valid_until: AtomicI64::new(i64::MIN) }
    }

    /// A certificate was verified now: tickets that follow rest on it. Replicas with several certificates share the
    /// earliest end; once that has passed, its tickets go and the count starts anew.
    pub(super) fn limit(&self, server_name: &ServerName<'_>, not_after: OffsetDateTime, now: UnixTime) {
        let not_after = not_after.min(self.own_not_after).unix_timestamp();
        if self.is_valid(now) {
            self.valid_until.fetch_min(not_after, Ordering::AcqRel);
            return;
        }
        let name = server_name.to_owned();
        // Old tickets first, so that none is seen under the new limit.
        while self.tickets.take_tls13_ticket(&name).is_some() {}
        self.valid_until.store(not_after, Ordering::Release);
    }

    fn is_valid(&self, now: UnixTime) -> bool {
        i64::try_from(now.as_secs()).is_ok_and(|now| now <= self.valid_until.load(Ordering::Acquire))
    }
}

impl ClientSessionStore for PairSessions {
    fn set_kx_hint(&self, server_name: ServerName<'static>, group: NamedGroup) {
        self.tickets.set_kx_hint(server_name, group);
    }

    fn kx_hint(&self, server_name: &ServerName<'_>) -> Option<NamedGroup> {
        self.tickets.kx_hint(server_name)
    }

    fn set_tls12_session(&self, _server_name: ServerName<'static>, _value: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _server_name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _server_name: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, server_name: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.tickets.insert_tls13_ticket(server_name, value);
    }

    fn take_tls13_ticket(&self, server_name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        if !self.is_valid(UnixTime::now()) {
            return None;
        }
        self.tickets.take_tls13_ticket(server_name)
    }
}

impl fmt::Debug for PairSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PairSessions").finish_non_exhaustive()
    }
}

/// What a server remembers of its clients, each session bound to the certificate that it was made under: once an
/// identity is renewed or removed, sessions with it cannot be resumed, also if it comes back. Those of other identities
/// can.
pub(super) struct CertificateSessions {
    sessions: Arc<ServerSessionMemoryCache>,
    locals: Arc<ArcSwap<Locals>>,
}

/// Length of the mark behind a session: the number of the certificate.
const MARK: usize = size_of::<u64>();

impl CertificateSessions {
    /// Remembers at most `capacity` sessions.
    pub(super) fn new(capacity: usize, locals: Arc<ArcSwap<Locals>>) -> Self {
        Self { sessions: ServerSessionMemoryCache::new(capacity), locals }
    }

    /// The number of the certificate with which this node answers now where the session was made.
    fn certificate(&self, session: &[u8]) -> Option<u64> {
        self.locals.load().named(asked_name(session)?).map(|local| local.number)
    }

    fn unmark(&self, mut marked: Vec<u8>) -> Option<Vec<u8>> {
        let session = marked.len().checked_sub(MARK)?;
        let number = u64::from_be_bytes(marked[session..].try_into().ok()?);
        marked.truncate(session);
        (self.certificate(&marked)? == number).then_some(marked)
    }
}

/// The name that the client of a session asked for. rustls writes it first: a one, its length, the name. Should another
/// version write something else, no session is kept, which a test notices.
fn asked_name(session: &[u8]) -> Option<&str> {
    let [1, length, rest @ ..] = session else { return None };
    std::str::from_utf8(rest.get(..usize::from(*length))?).ok()
}

impl StoresServerSessions for CertificateSessions {
    fn put(&self, key: Vec<u8>, mut value: Vec<u8>) -> bool {
        let Some(number) = self.certificate(&value) else { return false };
        value.extend_from_slice(&number.to_be_bytes());
        self.sessions.put(key, value)
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.unmark(self.sessions.get(key)?)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.unmark(self.sessions.take(key)?)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

impl fmt::Debug for CertificateSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateSessions").finish_non_exhaustive()
    }
}
