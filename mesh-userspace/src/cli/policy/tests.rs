//! The verbs about policy against a daemon that answers from a script.

use super::super::fake_daemon::FakeDaemon;
use super::super::tests::{json, run};
use super::*;
use crate::admin::policies::{PolicyRuleRow, PolicyWorkloads};

fn policy() -> PolicyRow {
    PolicyRow {
        namespace: "shop".to_owned(),
        name: "callers".to_owned(),
        action: "ALLOW".to_owned(),
        dry_run: true,
        targets: vec!["app=cart".to_owned(), "service cart".to_owned()],
        rules: vec![
            PolicyRuleRow {
                name: "web".to_owned(),
                sources: vec!["account shop/web".to_owned(), "10.0.0.0/8".to_owned()],
                ports: vec![80, 443],
                hits: 3,
            },
            PolicyRuleRow { name: "nobody".to_owned(), ..PolicyRuleRow::default() },
        ],
        workloads: PolicyWorkloads { total: 4, local: 1 },
        hits: 5,
    }
}

#[test]
fn policies_show_whom_they_are_for_and_how_often_they_decided() {
    let empty = PolicyRow { name: "none".to_owned(), rules: vec![], targets: vec![], dry_run: false, ..policy() };
    let daemon = FakeDaemon::answering("/v1/policies", json(vec![empty, policy()]));
    let table = "\
NAMESPACE  NAME     ACTION  DRY-RUN  TARGETS                 WORKLOADS  LOCAL  HITS
shop       callers  ALLOW   yes      app=cart; service cart          4      1     5
shop       none     ALLOW   no       all                             4      1     5
";
    for alias in ["policies", "policy", "pol"] {
        assert_eq!(run(&daemon.socket(), &["get", alias]), (Exit::Ok, table.to_owned(), String::new()));
    }
    let (_, wide, _) = run(&daemon.socket(), &["get", "pol", "-o", "wide", "--no-headers"]);
    let rows: Vec<&str> = wide.lines().collect();
    assert!(rows[0].ends_with("  web     account shop/web, 10.0.0.0/8  80,443  3"), "{wide}");
    assert!(rows[1].contains("nobody  nobody") && rows[1].ends_with("all     0"), "{wide}");
    assert!(rows[2].contains("none"), "{wide}");
}

#[test]
fn plaintext_callers_show_what_blocks_strict() {
    let row = PlaintextRow {
        destination: "shop/cart".to_owned(),
        source: "192.0.2.7".to_owned(),
        source_workload: None,
        ports: vec![80, 8080],
        admitted: 12,
        refused: 1,
        first_seen: "2026-11-23T11:00:00Z".to_owned(),
        last_seen: "2026-11-23T11:59:00Z".to_owned(),
    };
    let daemon = FakeDaemon::answering("/v1/plaintext", json(vec![row]));
    let table = "\
DESTINATION  SOURCE     WORKLOAD  PORTS    ADMITTED  REFUSED  FIRST-SEEN            LAST-SEEN
shop/cart    192.0.2.7  -         80,8080        12        1  2026-11-23T11:00:00Z  2026-11-23T11:59:00Z
";
    assert_eq!(run(&daemon.socket(), &["get", "plaintext"]), (Exit::Ok, table.to_owned(), String::new()));
}

fn path(verdict: &str) -> PathRow {
    let (policy, rule) = (Some("shop/block".to_owned()), Some("old".to_owned()));
    let reason = if verdict == "deny" { "denied" } else { "default_allow" };
    let named = verdict == "deny";
    PathRow {
        source: EndRow {
            address: "10.1.1.1".to_owned(),
            workload: Some("shop/web".to_owned()),
            identity: Some("spiffe://example.org/ns/shop/sa/web".to_owned()),
            node: Some("n1".to_owned()),
            mode: Some("strict".to_owned()),
        },
        asked: "10.96.0.1:80".to_owned(),
        protocol: "tcp".to_owned(),
        service: Some("shop/cart".to_owned()),
        balancing: Some("Random, 3 retries".to_owned()),
        destination: Some(EndRow {
            address: "10.1.2.2:8080".to_owned(),
            workload: Some("shop/cart-1".to_owned()),
            node: Some("n2".to_owned()),
            ..EndRow::default()
        }),
        arrives: "mtls".to_owned(),
        why: "both workloads are in the mesh".to_owned(),
        transport: Some("lanes".to_owned()),
        verdict: verdict.to_owned(),
        ruling: Some(RulingRow {
            verdict: verdict.to_owned(),
            reason: reason.to_owned(),
            policy: policy.clone().filter(|_| named),
            rule: rule.clone().filter(|_| named),
        }),
        audit: None,
        dry_run: (!named).then(|| RulingRow { verdict: "deny".to_owned(), reason: "denied".to_owned(), policy, rule }),
        enforced_by: Some("kernel_connect".to_owned()),
    }
}

#[test]
fn an_explanation_says_who_where_how_and_by_which_rule() {
    let asked = "/v1/explain?source=shop%2Fweb&destination=shop%2Fcart&port=80";
    let daemon = FakeDaemon::answering(asked, json(vec![path("deny")]));
    let text = "\
shop/web (10.1.1.1), spiffe://example.org/ns/shop/sa/web, node n1, strict to shop/cart at 10.96.0.1:80
  balances  Random, 3 retries
  reaches   shop/cart-1 (10.1.2.2:8080), node n2
  arrives   mtls over lanes: both workloads are in the mesh
  verdict   deny (denied) by rule old of policy shop/block; connect() fails at the source
";
    let told = run(&daemon.socket(), &["explain", "shop/web", "shop/cart:80"]);
    assert_eq!(told, (Exit::Findings, text.to_owned(), String::new()));
    let daemon = FakeDaemon::answering(asked, json(vec![path("allow")]));
    let (exit, out, _) = run(&daemon.socket(), &["explain", "shop/web", "shop/cart:80"]);
    assert_eq!(exit, Exit::Ok);
    assert!(out.contains("  verdict   allow (default_allow)\n"), "{out}");
    let would_be = "  dry-run   deny (denied) by rule old of policy shop/block with the policies in dry-run in force\n";
    assert!(out.ends_with(would_be), "{out}");
}

#[test]
fn destinations_may_be_addresses_with_and_without_a_port() {
    for (text, expected) in [
        ("shop/cart", ("shop/cart", None)),
        ("shop/cart:80", ("shop/cart", Some(80))),
        ("10.0.0.1:80", ("10.0.0.1", Some(80))),
        ("fd00::1", ("fd00::1", None)),
        ("[fd00::1]", ("fd00::1", None)),
        ("[fd00::1]:80", ("fd00::1", Some(80))),
    ] {
        assert_eq!(split(text), Ok(expected), "{text}");
    }
    for bad in ["shop/cart:http", "shop/cart:0", "shop/cart:", "[fd00::1]80", "10.0.0.1:65536"] {
        assert!(split(bad).is_err(), "{bad}");
    }
    let (exit, _, err) = run(std::path::Path::new("/nonexistent"), &["explain", "shop/web", "shop/cart:http"]);
    assert_eq!((exit, err.as_str()), (Exit::Failure, "error: \"http\" is no port: write a number from 1 to 65535\n"));
}

#[test]
fn an_unclear_question_is_told_as_the_daemon_says_it() {
    let daemon = FakeDaemon::answering("/elsewhere", String::new());
    let (exit, _, err) = run(&daemon.socket(), &["explain", "shop/web", "shop/x y&z"]);
    assert_eq!(exit, Exit::Failure);
    assert!(err.contains("/v1/explain?source=shop%2Fweb&destination=shop%2Fx%20y%26z"), "{err}");
}

#[test]
fn a_udp_port_is_asked_for_and_shown_as_one() {
    let asked = "/v1/explain?source=shop%2Fweb&destination=shop%2Fcart&port=53&protocol=udp";
    let row = PathRow { protocol: "udp".into(), asked: "10.96.0.1:53".into(), ..path("deny") };
    let daemon = FakeDaemon::answering(asked, json(vec![row]));
    let (exit, out, err) = run(&daemon.socket(), &["explain", "shop/web", "shop/cart:53/udp"]);
    assert_eq!(exit, Exit::Findings, "{err}");
    for part in ["10.96.0.1:53/udp", "connect() or sendto() fails"] {
        assert!(out.contains(part), "{part} is not in {out}");
    }
}
