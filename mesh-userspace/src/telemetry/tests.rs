//! What a scrape gets is what Prometheus accepts.

use super::ca::CaMetrics;
use super::catalog::CatalogMetrics;
use super::certificates::CertificateMetrics;
use super::connections::{EdgeKey, Party, Protocol, Reporter, ResponseFlag, Security, ServiceLabels};
use super::datagrams::DatagramMetrics;
use super::dns::{AnsweredBy, DnsMetrics};
use super::flows::FlowMetrics;
use super::tunnel::TunnelMetrics;
use super::*;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::SystemTime;

/// Every family with at least one sample.
pub(super) fn full() -> Metrics {
    let mut metrics = Metrics::new(Build { version: "0.1.0", abi: 1 });
    metrics.tls(Tls {
        kx: "X25519MLKEM768,X25519".to_owned(),
        suite: "TLS13_AES_256_GCM_SHA384".to_owned(),
        provider: "aws-lc-rs".to_owned(),
        fips: false,
    });
    datapath::register(metrics.registry(), datapath::sample());
    datapath::LeftOut::register(metrics.registry(), &["SVC"]);
    FlowMetrics::register(metrics.registry()).closed(150, 1);
    let catalog = CatalogMetrics::register(metrics.registry());
    catalog.show(&[("Service", 1)].into(), &[("M0203", 1)].into());
    catalog.applied(SystemTime::now());
    let certificates = CertificateMetrics::register(metrics.registry());
    certificates.rotated("success");
    certificates.asked("sign", "ok", std::time::Duration::from_millis(4));
    let names = DnsMetrics::register(metrics.registry());
    names.answered(AnsweredBy::Mesh, "nxdomain", std::time::Duration::from_micros(20));
    names.upstream_answered(std::time::Duration::from_millis(3));
    names.upstream_failed("timeout");
    bounds::register(metrics.registry(), || vec![bounds::Bound { name: "descriptors", used: 1, capacity: 2, hits: 3 }]);
    polling::register(metrics.registry(), || (std::time::Duration::from_millis(5), 2));
    metrics.accepts().count("tunnel", "descriptors");
    let authority = CaMetrics::register(metrics.registry());
    authority.prepare(&["workload"], &["not_scheduled"]);
    authority.expires("root", SystemTime::now());
    touch(&TunnelMetrics::register(metrics.registry()));
    let datagrams = DatagramMetrics::register(metrics.registry()).direction("outbound", 1);
    drop(datagrams.opened());
    datagrams.closed("idle");
    datagrams.dropped("flow_limit");
    policy::sample(metrics.policy());
    balance::sample(metrics.registry());
    let key = EdgeKey {
        reporter: Reporter::Source,
        source: Party::unknown(),
        // What must be escaped: names come from a catalog that others write.
        destination: Party { workload: "a\"b\\c\nd".into(), ..Party::unknown() },
        service: ServiceLabels::unknown(),
        protocol: Protocol::Tcp,
        security: Security::MutualTls,
    };
    for protocol in Protocol::ALL {
        let open = metrics.connections().edge(EdgeKey { protocol, ..key.clone() }).opened();
        open.add_sent(1);
        open.add_received(2);
        open.fail(ResponseFlag::Connect, "refused");
    }
    metrics
}

/// Gives every family of the tunnel a sample.
fn touch(tunnel: &TunnelMetrics) {
    drop(tunnel.lane_opened("lanes", "shared", "outbound"));
    tunnel.lane_closed("lanes", "outbound", "idle");
    tunnel.handshake_failed("lanes", "client", "unknown_ca");
    tunnel.stream_opened("lanes", "outbound");
    tunnel.stream_refused("lanes", "outbound", "refused");
    tunnel.stream_moved("outbound", "bulk");
    tunnel.rehandshaked("lanes", "renewed");
    tunnel.malformed_header("lanes", "too_long");
    let bytes = tunnel.bytes("lanes", "outbound");
    bytes.sent.inc();
    bytes.received.inc();
}

fn promtool(arguments: &[&str], input: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("promtool: {error}; `cargo xtask setup` installs it"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), said)
}

#[test]
fn promtool_finds_nothing_in_a_default_scrape() {
    for (what, metrics) in [("empty", Metrics::new(Build { version: "0.1.0", abi: 1 })), ("full", full())] {
        let (content_type, text) = metrics.encode(Some("*/*"));
        assert!(content_type.starts_with("text/plain; version=0.0.4"));
        let (passed, said) = promtool(&["check", "metrics"], &text);
        assert!(passed && said.is_empty(), "{what}: {said}\n{text}");
    }
}

/// promtool reads OpenMetrics with Prometheus' own parser when it makes blocks of it; that needs times on the samples.
#[test]
fn prometheus_parses_the_openmetrics_form() {
    let (content_type, text) = full().encode(Some("application/openmetrics-text; version=1.0.0"));
    assert!(content_type.starts_with("application/openmetrics-text; version=1.0.0"));
    assert!(text.ends_with("# EOF\n"));
    let timed: String = text
        .lines()
        .map(|line| if line.starts_with('#') { format!("{line}\n") } else { format!("{line} 1700000000\n") })
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let (input, blocks) = (directory.path().join("metrics"), directory.path().join("blocks"));
    std::fs::write(&input, timed).unwrap();
    let arguments = ["tsdb", "create-blocks-from", "openmetrics", input.to_str().unwrap(), blocks.to_str().unwrap()];
    let (passed, said) = promtool(&arguments, "");
    assert!(passed, "{said}\n{text}");
    assert!(said.contains("BLOCK ULID"), "no block was made: {said}");
}
