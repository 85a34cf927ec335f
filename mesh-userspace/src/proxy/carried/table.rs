//! The connections that the kernel carries, as it tells of them: records may be late, out of order or lost. Pure: time is
//! an argument.

use crate::proxy::Failure;
use crate::runtime::Level;
use mesh_common::maps::MAX_ADMITTED;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long the destination's socket may take to report after the source's.
pub(super) const LINGERING: Duration = Duration::from_secs(5);

/// Cuts remembered for connections that are yet to be told of; without it, their reason is missing.
const EARLY_CUTS: usize = 1024;

/// Room for all that the kernel admits at once, and as much again for what has ended and lingers.
const CAPACITY: usize = 2 * MAX_ADMITTED as usize;

/// A connection's ends: the source, and the destination's own address.
pub(in crate::proxy) type Ends = (SocketAddr, SocketAddr);

/// One connection; ports are used again, moments are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    pub(super) ends: Ends,
    pub(super) connected_at_ns: u64,
}

/// What is told of a connection.
pub(super) trait Told {
    fn fail(&self, failure: &Failure);
    /// Bytes went from the source to the destination.
    fn asked(&self, bytes: u64);
    /// Bytes went from the destination to the source.
    fn answered(&self, bytes: u64);
}

/// What the source's socket says when it closes.
#[derive(Debug)]
pub(super) struct SourceEnd {
    /// Why it was never connected, if it was not.
    pub(super) failure: Option<Failure>,
    pub(super) sent: u64,
    pub(super) received: u64,
    /// The destination's socket will say how much it has sent.
    pub(super) is_served: bool,
}

#[derive(Debug)]
struct Open<T> {
    told: T,
    /// When the source's socket closed, and what it had received.
    source_closed: Option<(Instant, u64)>,
    /// Whether the destination's socket has closed, or will not report.
    is_answered: bool,
}

impl<T: Told> Open<T> {
    /// The destination's socket has reported, or does not.
    fn answer(&mut self, bytes: u64) {
        if !std::mem::replace(&mut self.is_answered, true) {
            self.told.answered(bytes);
        }
    }
}

/// What is dropped has ended; whoever holds the table's lock hands it out to be dropped later.
#[derive(Debug)]
pub(super) struct Table<T> {
    open: HashMap<Name, Open<T>>,
    capacity: usize,
    /// Connections that found no room.
    missed: u64,
    /// Why those were ended whose beginning was not told yet.
    cuts: Vec<Early>,
}

/// A cut of connections that are not known yet: records gather before they are told.
#[derive(Debug)]
struct Early {
    ends: Ends,
    failure: Failure,
    at: Cutting,
}

/// When a connection was cut: by the clock of the kernel's records, and for how long it is remembered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cutting {
    pub(super) nanoseconds: u64,
    pub(super) moment: Instant,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { open: HashMap::new(), capacity: CAPACITY, missed: 0, cuts: Vec::new() }
    }
}

impl<T: Told> Table<T> {
    pub(super) fn contains(&self, name: &Name) -> bool {
        self.open.contains_key(name)
    }

    /// Takes a connection up, unless it is known or there is no room: that is counted.
    pub(super) fn begin(&mut self, name: Name, told: impl FnOnce() -> T) {
        if self.contains(&name) {
            return;
        }
        if self.open.len() >= self.capacity {
            self.missed += 1;
            return;
        }
        let told = told();
        let is_early = |cut: &Early| cut.ends == name.ends && name.connected_at_ns < cut.at.nanoseconds;
        if let Some(cut) = self.cuts.iter().position(is_early) {
            told.fail(&self.cuts.swap_remove(cut).failure);
        }
        self.open.insert(name, Open { told, source_closed: None, is_answered: false });
    }

    /// Notes why connections are about to be ended, before they are.
    pub(super) fn cut(&mut self, ends: Ends, failure: Failure, at: Cutting) {
        let mut is_known = false;
        for (name, open) in &self.open {
            if name.ends == ends && open.source_closed.is_none() {
                open.told.fail(&failure);
                is_known = true;
            }
        }
        if !is_known && self.cuts.len() < EARLY_CUTS {
            self.cuts.push(Early { ends, failure, at });
        }
    }

    /// The source's socket has closed; what has ended with it.
    pub(super) fn source_closed(&mut self, name: &Name, end: &SourceEnd, now: Instant) -> Option<T> {
        let open = self.open.get_mut(name)?;
        if let Some(failure) = &end.failure {
            open.told.fail(failure);
        }
        open.told.asked(end.sent);
        if !end.is_served {
            open.answer(end.received);
        }
        open.source_closed = Some((now, end.received));
        if open.is_answered { self.remove(name) } else { None }
    }

    /// The destination's socket has closed, and had sent so much; what has ended with it.
    pub(super) fn destination_closed(&mut self, name: &Name, sent: u64) -> Option<T> {
        let open = self.open.get_mut(name)?;
        open.answer(sent);
        if open.source_closed.is_some() { self.remove(name) } else { None }
    }

    /// Ends connections whose source has reported long ago and whose destination does not.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<T> {
        self.cuts.retain(|cut| now.duration_since(cut.at.moment) <= LINGERING);
        let overdue = |open: &Open<T>| open.source_closed.filter(|(at, _)| now.duration_since(*at) > LINGERING);
        self.open
            .extract_if(|_, open| overdue(open).map(|(_, received)| open.answer(received)).is_some())
            .map(|(_, open)| open.told)
            .collect()
    }

    /// Ends connections that began before `moment` (CLOCK_MONOTONIC nanoseconds), that are not among the `known` and whose
    /// end was not told.
    pub(super) fn retain_known(&mut self, known: &HashSet<Name>, moment: u64) -> Vec<T> {
        let is_lost = |name: &Name, open: &Open<T>| {
            open.source_closed.is_none() && name.connected_at_ns < moment && !known.contains(name)
        };
        self.open.extract_if(|name, open| is_lost(name, open)).map(|(_, open)| open.told).collect()
    }

    pub(super) fn level(&self) -> Level {
        let (used, capacity) = (self.open.len() as u64, self.capacity as u64);
        Level { bound: "kernel_carried_connections", used, capacity, hits: self.missed }
    }

    fn remove(&mut self, name: &Name) -> Option<T> {
        self.open.remove(name).map(|open| open.told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// What was told, in order.
    #[derive(Clone, Debug, Default)]
    struct Log(Rc<RefCell<Vec<String>>>);

    impl Log {
        fn push(&self, entry: String) {
            self.0.borrow_mut().push(entry);
        }

        fn is(&self, expected: &[&str]) {
            assert_eq!(*self.0.borrow(), expected);
        }
    }

    impl Told for Log {
        fn fail(&self, failure: &Failure) {
            self.push(format!("failed {}", failure.reason()));
        }

        fn asked(&self, bytes: u64) {
            self.push(format!("asked {bytes}"));
        }

        fn answered(&self, bytes: u64) {
            self.push(format!("answered {bytes}"));
        }
    }

    fn name(port: u16) -> Name {
        let ends = (SocketAddr::from(([10, 0, 0, 1], port)), "10.0.0.2:80".parse().unwrap());
        Name { ends, connected_at_ns: 1_000 + u64::from(port) }
    }

    fn end(sent: u64, received: u64, is_served: bool) -> SourceEnd {
        SourceEnd { failure: None, sent, received, is_served }
    }

    fn begun(port: u16) -> (Table<Log>, Name, Log) {
        let (mut table, name, log) = (Table::default(), name(port), Log::default());
        table.begin(name, || log.clone());
        (table, name, log)
    }

    #[test]
    fn a_connection_ends_with_the_second_of_its_two_reports_in_either_order() {
        let now = Instant::now();
        let (mut table, name, log) = begun(1);
        assert!(table.source_closed(&name, &end(10, 19, true), now).is_none());
        assert!(table.destination_closed(&name, 20).is_some());
        log.is(&["asked 10", "answered 20"]);
        assert_eq!(table.level().used, 0);

        let (mut table, name, log) = begun(1);
        assert!(table.destination_closed(&name, 20).is_none());
        assert!(table.source_closed(&name, &end(10, 19, true), now).is_some());
        log.is(&["answered 20", "asked 10"]);
        assert!(!table.contains(&name));
    }

    #[test]
    fn what_the_source_has_received_stands_for_a_destination_that_does_not_report() {
        let (mut table, name, log) = begun(1);
        assert!(table.source_closed(&name, &end(10, 19, false), Instant::now()).is_some());
        log.is(&["asked 10", "answered 19"]);
    }

    #[test]
    fn a_destinations_report_that_is_lost_is_replaced_after_a_while() {
        let now = Instant::now();
        let (mut table, name, log) = begun(1);
        table.source_closed(&name, &end(10, 19, true), now);
        assert!(table.expire(now + LINGERING).is_empty());
        assert_eq!(table.expire(now + LINGERING + Duration::from_millis(1)).len(), 1);
        log.is(&["asked 10", "answered 19"]);
        assert!(table.destination_closed(&name, 20).is_none(), "it comes too late");
        log.is(&["asked 10", "answered 19"]);
    }

    #[test]
    fn an_open_connection_does_not_expire_but_is_given_up_when_the_kernel_forgot_it() {
        let now = Instant::now();
        let (mut table, first, _) = begun(1);
        let second = name(2);
        table.begin(second, Log::default);
        assert!(table.expire(now + Duration::from_hours(1)).is_empty());
        let known = HashSet::from([first]);
        assert!(table.retain_known(&known, second.connected_at_ns).is_empty(), "it began after the list was made");
        assert_eq!(table.retain_known(&known, second.connected_at_ns + 1).len(), 1);
        assert!(table.contains(&first) && !table.contains(&second));
        // One that has closed is waited for, whatever the kernel knows.
        table.source_closed(&first, &end(0, 0, true), now);
        assert!(table.retain_known(&HashSet::new(), u64::MAX).is_empty());
    }

    #[test]
    fn a_beginning_that_is_told_twice_is_one_connection() {
        let (mut table, name, log) = begun(1);
        table.begin(name, || unreachable!("it is known"));
        assert_eq!(table.level().used, 1);
        table.source_closed(
            &name,
            &SourceEnd { failure: Some(Failure::ApplicationTimeout), ..end(0, 0, false) },
            Instant::now(),
        );
        log.is(&["failed application_timeout", "asked 0", "answered 0"]);
    }

    #[test]
    fn a_cut_is_told_to_open_connections_of_these_ends_alone() {
        let (mut table, first, log) = begun(1);
        let other = Log::default();
        table.begin(name(2), || other.clone());
        table.cut(first.ends, Failure::WorkloadRemoved, cutting());
        log.is(&["failed workload_removed"]);
        other.is(&[]);
        table.source_closed(&first, &end(1, 1, true), Instant::now());
        table.cut(first.ends, Failure::WorkloadRemoved, cutting());
        log.is(&["failed workload_removed", "asked 1"]);
    }

    fn cutting() -> Cutting {
        Cutting { nanoseconds: 1_000_000, moment: Instant::now() }
    }

    #[test]
    fn a_connection_that_is_cut_before_it_is_told_of_is_told_why_and_a_later_one_is_not() {
        let (mut table, first, log) = (Table::default(), name(1), Log::default());
        let at = cutting();
        table.cut(first.ends, Failure::WorkloadRemoved, at);
        let later = Name { connected_at_ns: at.nanoseconds + 1, ..first };
        table.begin(later, || log.clone());
        log.is(&[]);
        table.begin(first, || log.clone());
        log.is(&["failed workload_removed"]);
        assert!(table.cuts.is_empty());
        table.cut(name(2).ends, Failure::WorkloadRemoved, at);
        table.expire(at.moment + LINGERING * 2);
        table.begin(name(2), || log.clone());
        log.is(&["failed workload_removed"]);
    }

    #[test]
    fn what_finds_no_room_is_counted_and_its_reports_change_nothing() {
        let mut table = Table { capacity: 2, ..Table::default() };
        (1..=3).for_each(|port| table.begin(name(port), Log::default));
        let level = |used, hits| Level { bound: "kernel_carried_connections", used, capacity: 2, hits };
        assert_eq!(table.level(), level(2, 1));
        assert!(table.source_closed(&name(3), &end(1, 1, false), Instant::now()).is_none());
        assert!(table.destination_closed(&name(3), 1).is_none());
        assert!(table.source_closed(&name(1), &end(1, 1, false), Instant::now()).is_some());
        table.begin(name(3), Log::default);
        assert_eq!(table.level(), level(2, 1));
    }

    #[test]
    fn there_is_room_for_all_that_the_kernel_admits() {
        assert!(Table::<Log>::default().level().capacity >= 2 * u64::from(MAX_ADMITTED));
    }
}
