//! A client's resumable sessions with one destination identity.

use rustls::NamedGroup;
use rustls::client::{ClientSessionMemoryCache, ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls_pki_types::{ServerName, UnixTime};
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use time::OffsetDateTime;

/// Tickets of one pair of identities. Resuming skips the check of the server's certificate, so tickets are given out
/// only while each certificate that they may rest on is still valid.
pub(super) struct PairSessions {
    tickets: ClientSessionMemoryCache,
    /// Seconds since 1970.
    valid_until: AtomicI64,
}

impl PairSessions {
    pub(super) fn new() -> Self {
        // One server name, the pair's; rustls keeps 8 tickets of it.
        Self { tickets: ClientSessionMemoryCache::new(1), valid_until: AtomicI64::new(i64::MIN) }
    }

    /// A certificate was verified now: tickets that follow rest on it. Replicas with several certificates share the
    /// earliest end; once that has passed, its tickets go and the count starts anew.
    pub(super) fn limit(&self, server_name: &ServerName<'_>, not_after: OffsetDateTime, now: UnixTime) {
        let not_after = not_after.unix_timestamp();
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
