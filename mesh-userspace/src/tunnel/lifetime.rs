//! How long a connection between nodes may rest on one handshake.

use std::time::Duration;
use time::OffsetDateTime;
use tokio::time::Instant;

/// Beyond this a certificate's end is of no interest: no connection gets that old.
const FAR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The moments in a connection's life that follow from the certificates of its handshake.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetime {
    pub(super) opened: Instant,
    /// From here on the client renews it: new streams go elsewhere, and those that can move do. Three fifths of what
    /// the certificates had left: a certificate is renewed at about half of its life, so a fresh one is there by then,
    /// and two fifths remain for tries that fail.
    pub(super) renew: Instant,
    /// The first of the certificates ends.
    pub(super) end: Instant,
    /// The same, by the wall clock.
    pub(super) not_after: OffsetDateTime,
}

impl Lifetime {
    /// `ends` are those of the certificates that the handshake rests on: this side's and the peer's. One that is not
    /// known counts as over.
    pub(super) fn new(ends: [Option<OffsetDateTime>; 2]) -> Self {
        let (opened, now) = (Instant::now(), OffsetDateTime::now_utc());
        let not_after = ends.into_iter().map(|end| end.unwrap_or(now)).min().unwrap_or(now);
        let left = Duration::try_from(not_after - now).unwrap_or_default().min(FAR);
        Self { opened, renew: opened + left * 3 / 5, end: opened + left, not_after }
    }

    /// How often its moments are to be looked at, so that none is noticed late.
    pub(super) fn tick(&self) -> Duration {
        (self.end - self.opened) / 40
    }

    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.end
    }

    /// What came of a new handshake, in words of the metrics.
    pub(super) fn renewed_by(&self, new: &Self) -> &'static str {
        if new.not_after > self.not_after { "renewed" } else { "unchanged" }
    }

    /// How long to wait before the next try to renew it: more and more often towards the end.
    pub(super) fn retry(&self, now: Instant) -> Duration {
        (self.end.saturating_duration_since(now) / 12).clamp(Duration::from_millis(50), Duration::from_secs(60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_renewed_well_before_the_first_certificate_ends() {
        let now = OffsetDateTime::now_utc();
        let after = |seconds| Some(now + time::Duration::seconds(seconds));
        for ends in [[after(100), after(50)], [after(50), after(3600)]] {
            let lifetime = Lifetime::new(ends);
            let (renew, end) = (lifetime.renew - lifetime.opened, lifetime.end - lifetime.opened);
            assert!(end <= Duration::from_secs(50) && end > Duration::from_secs(40), "{end:?}");
            assert!(renew * 5 / 3 <= end && renew > end / 2, "{renew:?} of {end:?}");
            assert_eq!(Some(lifetime.not_after), ends.into_iter().flatten().min());
        }
    }

    #[test]
    fn one_whose_certificates_are_unknown_or_over_ends_at_once() {
        let past = Some(OffsetDateTime::now_utc() - time::Duration::seconds(1));
        let future = Some(OffsetDateTime::now_utc() + time::Duration::days(100_000));
        for ends in [[past, future], [None, future], [None, None]] {
            let lifetime = Lifetime::new(ends);
            assert_eq!((lifetime.renew, lifetime.end), (lifetime.opened, lifetime.opened));
            assert!(lifetime.is_over());
        }
        let far = Lifetime::new([future, future]);
        assert!(far.end > far.renew);
    }

    #[test]
    fn tries_come_closer_together_towards_the_end() {
        let lifetime = Lifetime::new([Some(OffsetDateTime::now_utc() + time::Duration::hours(12)); 2]);
        let at = |left| lifetime.retry(lifetime.end - Duration::from_secs(left));
        assert_eq!(at(3600), Duration::from_secs(60));
        assert_eq!(at(12), Duration::from_secs(1));
        assert_eq!(lifetime.retry(lifetime.end), Duration::from_millis(50));
    }
}
