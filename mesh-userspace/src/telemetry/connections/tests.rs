use super::*;
use prometheus_client::encoding::text;
use proptest::prelude::*;

fn party(name: &str) -> Party {
    Party {
        workload: name.into(),
        namespace: "shop".into(),
        canonical_service: name.into(),
        principal: format!("spiffe://example.org/ns/shop/sa/{name}").into(),
    }
}

fn key(reporter: Reporter, source: &str) -> EdgeKey {
    let service =
        ServiceLabels { host: "cart.shop.svc.cluster.local".into(), name: "cart".into(), namespace: "shop".into() };
    let (protocol, security) = (Protocol::Tcp, Security::MutualTls);
    EdgeKey { reporter, source: party(source), destination: party("cart"), service, protocol, security }
}

struct Metered {
    registry: Registry,
    metrics: ConnectionMetrics,
}

impl Metered {
    fn new(series: usize) -> Self {
        let mut registry = Registry::with_prefix("nodemesh");
        let metrics = ConnectionMetrics::with_limits(&mut registry, Limits { series, ..Limits::default() });
        Self { registry, metrics }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.registry).unwrap();
        out
    }

    /// The sum of a family's samples whose labels contain all of `labels`.
    fn sum(&self, sample: &str, labels: &[&str]) -> u64 {
        let text = self.text();
        let samples = text.lines().filter(|line| line.starts_with(&format!("nodemesh_{sample}{{")));
        let matching = samples.filter(|line| labels.iter().all(|label| line.contains(label)));
        matching.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    fn samples(&self, sample: &str) -> usize {
        self.text().lines().filter(|line| line.starts_with(&format!("nodemesh_{sample}{{"))).count()
    }
}

/// Later than the idle limit.
fn later() -> Instant {
    Instant::now() + Limits::default().idle + Duration::from_secs(1)
}

#[test]
fn a_connection_is_counted_while_it_lives_and_when_it_ends() {
    let metered = Metered::new(10);
    let edge = metered.metrics.edge(key(Reporter::Source, "web"));
    let open = edge.opened();
    open.add_sent(100);
    open.add_received(20);
    open.add_sent(1);
    assert_eq!((open.traffic().sent(), open.traffic().received()), (101, 20));
    assert_eq!(metered.sum("tcp_connections_active", &["reporter=\"source\""]), 1);
    assert_eq!(metered.sum("tcp_sent_bytes_total", &[]), 101, "bytes are visible before the connection ends");
    assert_eq!(metered.sum("tcp_connections_closed_total", &[]), 0);
    drop(open);
    assert_eq!(metered.sum("tcp_connections_active", &[]), 0);
    assert_eq!(metered.sum("tcp_connections_closed_total", &[]), 1);
    assert_eq!(metered.sum("tcp_connection_duration_seconds_count", &[]), 1);
    let totals = Totals { active: 0, opened: 1, closed: 1, failed: 0, sent: 101, received: 20 };
    assert_eq!(metered.metrics.totals(Protocol::Tcp), totals);
}

#[test]
fn the_labels_are_istios() {
    let metered = Metered::new(10);
    drop(metered.metrics.edge(key(Reporter::Destination, "web")).opened());
    let line = "nodemesh_tcp_connections_opened_total{reporter=\"destination\",source_workload=\"web\",\
                source_workload_namespace=\"shop\",source_canonical_service=\"web\",\
                source_principal=\"spiffe://example.org/ns/shop/sa/web\",destination_workload=\"cart\",\
                destination_workload_namespace=\"shop\",destination_canonical_service=\"cart\",\
                destination_principal=\"spiffe://example.org/ns/shop/sa/cart\",\
                destination_service=\"cart.shop.svc.cluster.local\",destination_service_name=\"cart\",\
                destination_service_namespace=\"shop\",request_protocol=\"tcp\",\
                connection_security_policy=\"mutual_tls\"} 1";
    let text = metered.text();
    assert!(text.lines().any(|found| found == line), "{text}");
    let duration = text.lines().find(|line| line.contains("duration_seconds_count")).unwrap();
    assert!(!duration.contains("principal") && !duration.contains("_workload="), "{duration}");
}

#[test]
fn what_is_unknown_is_one_series() {
    let metered = Metered::new(10);
    let nameless = Party { workload: "".into(), ..Party::unknown() };
    drop(metered.metrics.edge(EdgeKey { source: nameless, ..key(Reporter::Source, "web") }).opened());
    drop(metered.metrics.edge(EdgeKey { source: Party::unknown(), ..key(Reporter::Source, "web") }).opened());
    assert_eq!(metered.samples("tcp_connections_opened_total"), 1);
    assert_eq!(metered.sum("tcp_connections_opened_total", &["source_workload=\"unknown\""]), 2);
}

#[test]
fn only_the_first_cause_of_a_failure_counts() {
    let metered = Metered::new(10);
    let open = metered.metrics.edge(key(Reporter::Source, "web")).opened();
    open.fail(ResponseFlag::TlsFailure, "unknown_ca");
    open.fail(ResponseFlag::Connect, "closed");
    assert_eq!(open.failure(), Some(Failure { flag: ResponseFlag::TlsFailure, reason: "unknown_ca" }));
    drop(open);
    let labels = ["response_flags=\"TLS_FAILURE\"", "reason=\"unknown_ca\"", "source_workload=\"web\""];
    assert_eq!(metered.sum("tcp_connections_failed_total", &labels), 1);
    assert_eq!(metered.sum("tcp_connections_failed_total", &[]), 1);
    assert_eq!(metered.sum("tcp_connections_closed_total", &[]), 1, "a failed connection has ended, too");
}

#[test]
fn past_the_cap_edges_share_a_series_and_that_is_counted() {
    let metered = Metered::new(2);
    let edges: Vec<_> = (0..5).map(|i| metered.metrics.edge(key(Reporter::Source, &format!("w{i}")))).collect();
    for edge in &edges {
        let open = edge.opened();
        open.add_sent(10);
        open.fail(ResponseFlag::Connect, "refused");
    }
    assert_eq!(metered.metrics.series(), 2);
    assert_eq!(metered.samples("tcp_connections_opened_total"), 3);
    let overflow = ["overflow=\"true\"", "reporter=\"source\""];
    assert_eq!(metered.sum("tcp_connections_opened_total", &overflow), 3);
    assert_eq!(metered.sum("tcp_sent_bytes_total", &overflow), 30);
    assert_eq!(metered.sum("tcp_connections_failed_total", &overflow), 3);
    assert_eq!(metered.sum("tcp_connections_failed_total", &[]), 5);
    assert_eq!(metered.sum("metrics_series_dropped_total", &["family=\"tcp_connections\""]), 3);
}

#[test]
fn causes_past_the_cap_are_still_counted() {
    let metered = Metered::new(1);
    let open = || metered.metrics.edge(key(Reporter::Source, "web")).opened();
    for reason in ["refused", "timeout", "timeout", "denied", "refused"] {
        open().fail(ResponseFlag::Connect, reason);
    }
    assert_eq!(metered.sum("tcp_connections_failed_total", &["source_workload", "reason=\"refused\""]), 2);
    assert_eq!(metered.sum("tcp_connections_failed_total", &["overflow=\"true\""]), 3);
    assert_eq!(metered.sum("metrics_series_dropped_total", &["family=\"tcp_connections_failed\""]), 3);
}

#[test]
fn an_idle_series_expires_and_comes_back_through_an_old_handle() {
    let metered = Metered::new(20);
    let edge = metered.metrics.edge(key(Reporter::Source, "web"));
    drop(edge.opened());
    assert_eq!(metered.metrics.expire(Instant::now()), 0, "it was used just now");
    assert_eq!(metered.metrics.expire(later()), 1);
    assert_eq!((metered.metrics.series(), metered.samples("tcp_connections_opened_total")), (0, 0));
    assert_eq!(metered.samples("tcp_connection_duration_seconds_count"), 0);
    let open = edge.opened();
    open.add_sent(3);
    assert_eq!(metered.sum("tcp_sent_bytes_total", &["source_workload=\"web\""]), 3);
    assert_eq!(metered.metrics.totals(Protocol::Tcp).opened, 2, "totals outlive the series");
}

#[test]
fn a_series_in_use_never_expires() {
    let metered = Metered::new(1);
    let open = metered.metrics.edge(key(Reporter::Source, "web")).opened();
    assert_eq!(metered.metrics.expire(later()), 0);
    open.add_received(9);
    assert_eq!(metered.sum("tcp_received_bytes_total", &["source_workload=\"web\""]), 9);
}

#[test]
fn an_overflowing_edge_gets_its_own_series_once_there_is_room() {
    let metered = Metered::new(1);
    drop(metered.metrics.edge(key(Reporter::Source, "first")).opened());
    let late = metered.metrics.edge(key(Reporter::Source, "late"));
    drop(late.opened());
    assert_eq!(metered.sum("tcp_connections_opened_total", &["overflow"]), 1);
    metered.metrics.expire(later());
    drop(late.opened());
    assert_eq!(metered.sum("tcp_connections_opened_total", &["source_workload=\"late\""]), 1);
}

#[test]
fn concurrent_connections_and_expiry_lose_no_count() {
    const THREADS: u64 = 4;
    const EACH: u64 = 20_000;
    let metered = Metered::new(100);
    let edge = metered.metrics.edge(key(Reporter::Source, "web"));
    std::thread::scope(|scope| {
        let connect = || (0..EACH).for_each(|_| edge.opened().add_sent(1));
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(connect)).collect();
        while !threads.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            metered.metrics.expire(later());
        }
    });
    let expected = THREADS * EACH;
    let totals = Totals { active: 0, opened: expected, closed: expected, failed: 0, sent: expected, received: 0 };
    assert_eq!(metered.metrics.totals(Protocol::Tcp), totals);
}

#[test]
fn a_hundred_thousand_workloads_come_and_go_within_the_bound() {
    let metered = Metered::new(1_000);
    for generation in 0..10 {
        for i in 0..10_000 {
            drop(metered.metrics.edge(key(Reporter::Source, &format!("w{generation}-{i}"))).opened());
        }
        assert_eq!(metered.metrics.series(), 1_000);
        metered.metrics.expire(later());
        assert_eq!(metered.metrics.series(), 0);
    }
    assert_eq!(metered.metrics.totals(Protocol::Tcp).opened, 100_000);
}

#[derive(Clone, Debug)]
enum Step {
    Open { source: u8, destination: bool },
    Close(usize),
    Fail(usize, u8),
    Transfer(usize, u16),
    Expire { idle: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<u8>(), any::<bool>()).prop_map(|(source, destination)| Step::Open { source, destination }),
        3 => any::<usize>().prop_map(Step::Close),
        1 => (any::<usize>(), 0u8..4).prop_map(|(which, reason)| Step::Fail(which, reason)),
        2 => (any::<usize>(), any::<u16>()).prop_map(|(which, bytes)| Step::Transfer(which, bytes)),
        1 => any::<bool>().prop_map(|idle| Step::Expire { idle }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn churn_keeps_series_bounded_and_sums_exact(cap in 1usize..12, steps in prop::collection::vec(step(), 1..200)) {
        const REASONS: [&str; 4] = ["refused", "timeout", "denied", "unknown_ca"];
        let metered = Metered::new(cap);
        let mut open: Vec<OpenConnection> = Vec::new();
        let mut expected = Totals::default();
        for step in steps {
            match step {
                Step::Open { source, destination } => {
                    let reporter = if destination { Reporter::Destination } else { Reporter::Source };
                    open.push(metered.metrics.edge(key(reporter, &format!("w{source}"))).opened());
                    expected.opened += 1;
                }
                Step::Expire { idle } => {
                    metered.metrics.expire(if idle { later() } else { Instant::now() });
                }
                Step::Close(which) if !open.is_empty() => {
                    open.swap_remove(which % open.len());
                    expected.closed += 1;
                }
                Step::Fail(which, reason) if !open.is_empty() => {
                    let connection = &open[which % open.len()];
                    expected.failed += u64::from(connection.failure().is_none());
                    connection.fail(ResponseFlag::Connect, REASONS[usize::from(reason)]);
                }
                Step::Transfer(which, bytes) if !open.is_empty() => {
                    open[which % open.len()].add_received(bytes.into());
                    expected.received += u64::from(bytes);
                }
                Step::Close(_) | Step::Fail(..) | Step::Transfer(..) => {}
            }
            expected.active = open.len() as u64;
            prop_assert_eq!(metered.metrics.totals(Protocol::Tcp), expected);
            prop_assert!(metered.metrics.series() <= cap);
        }
        // Two overflow series, one for each reporter; a failed one for each cause.
        prop_assert!(metered.samples("tcp_connections_opened_total") <= cap + 2);
        prop_assert!(metered.samples("tcp_connections_failed_total") <= cap + 2 * REASONS.len());
        prop_assert_eq!(metered.sum("tcp_connections_active", &[]), expected.active);
    }
}

#[test]
fn flows_of_datagrams_have_families_and_a_bound_of_their_own() {
    let metered = Metered::new(1);
    let tcp = metered.metrics.edge(key(Reporter::Source, "web")).opened();
    let flow = metered.metrics.edge(EdgeKey { protocol: Protocol::Udp, ..key(Reporter::Source, "web") }).opened();
    flow.add_received_datagram(70);
    flow.add_sent_datagram(250);
    flow.add_sent_datagram(250);
    let traffic = flow.traffic();
    assert_eq!((traffic.datagrams_received(), traffic.datagrams_sent()), (1, 2));
    drop((tcp, flow));
    let udp = ["request_protocol=\"udp\"", "source_workload=\"web\""];
    assert_eq!(metered.sum("udp_flows_closed_total", &udp), 1, "{}", metered.text());
    assert_eq!(metered.sum("udp_sent_bytes_total", &udp), 500);
    assert_eq!(metered.sum("udp_received_bytes_total", &udp), 70);
    assert_eq!(metered.sum("tcp_connections_closed_total", &["request_protocol=\"tcp\""]), 1);
    assert_eq!(metered.metrics.totals(Protocol::Udp).sent, 500);
    assert_eq!(metered.metrics.totals(Protocol::Tcp).sent, 0);
}

#[test]
fn a_connection_that_moves_leaves_what_passed_on_the_edge_where_it_passed() {
    let metered = Metered::new(10);
    let open = metered.metrics.edge(key(Reporter::Source, "web")).opened();
    open.add_sent(3);
    open.moved_to(&metered.metrics.edge(key(Reporter::Source, "other")));
    open.add_sent(4);
    drop(open);
    for (source, bytes) in [("web", 3), ("other", 4)] {
        let label = format!("source_workload=\"{source}\"");
        assert_eq!(metered.sum("tcp_sent_bytes_total", &[&label]), bytes, "{}", metered.text());
        assert_eq!(metered.sum("tcp_connections_closed_total", &[&label]), 1, "{}", metered.text());
    }
}
