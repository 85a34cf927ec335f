//! Answers about the small mesh.

use super::super::fixture::{catalog, name, policy, snapshot, workload};
use super::*;
use crate::model::{Catalog, Mode, PolicyAction, Service, ServicePort, TargetPort};
use mesh_common::policy::Reason;

fn ask(catalog: Catalog, source: &str, destination: &str, port: Option<u16>) -> Result<Explanation, UnclearQuestion> {
    ask_over(None, catalog, source, destination, port)
}

fn ask_over(
    protocol: Option<Protocol>,
    catalog: Catalog,
    source: &str,
    destination: &str,
    port: Option<u16>,
) -> Result<Explanation, UnclearQuestion> {
    let question = Question { source: source.to_owned(), destination: destination.to_owned(), port, protocol };
    explain(&snapshot(catalog), &question)
}

fn path(catalog: Catalog, source: &str, destination: &str, port: Option<u16>) -> Path {
    let mut paths = ask(catalog, source, destination, port).unwrap().paths;
    assert_eq!(paths.len(), 1, "{paths:?}");
    paths.remove(0)
}

fn denying() -> Catalog {
    let mut catalog = catalog();
    catalog.policies.insert(name("block"), policy("block", PolicyAction::Deny, "client").into());
    catalog
}

#[test]
fn a_workload_is_found_by_name_address_and_identity() {
    for source in ["shop/client", "10.0.0.1", "::ffff:10.0.0.1", "spiffe://example.org/ns/shop/sa/client"] {
        let source = ask(catalog(), source, "shop/server", None).unwrap().source;
        assert_eq!(source.workload.unwrap().name, name("client"));
        assert_eq!(source.address, IpAddr::from([10, 0, 0, 1]));
    }
}

#[test]
fn a_denied_edge_is_refused_at_the_source_by_its_rule() {
    let allowed = path(denying(), "shop/other", "shop/server", None);
    assert!(!allowed.is_refused());
    assert_eq!(allowed.how, How::MutualTls { transport: "lanes" });
    assert_eq!(allowed.address, Some("10.0.0.2:8080".parse().unwrap()));
    for (destination, port) in [("shop/server", None), ("10.96.0.1", Some(80)), ("10.0.0.2", Some(8080))] {
        let denied = path(denying(), "shop/client", destination, port);
        assert!(denied.is_refused());
        assert_eq!(denied.enforced_by, Some(EnforcedBy::KernelConnect));
        assert_eq!(denied.told.unwrap().ruling.to_string(), "deny: denied by rule 0 of policy shop/block");
    }
}

#[test]
fn endpoints_of_different_policies_are_told_apart() {
    let mut catalog = denying();
    let mut second = workload("server-2", "10.0.0.4");
    second.labels.insert("app".to_owned(), "server".to_owned());
    second.labels.insert("new".to_owned(), "yes".to_owned());
    catalog.workloads.insert(name("server-2"), second.into());
    let mut only_new = policy("strict", PolicyAction::Deny, "other");
    only_new.targets = vec![crate::model::PolicyTarget::Selector([("new".to_owned(), "yes".to_owned())].into())];
    catalog.policies.insert(name("strict"), only_new.into());
    let explained = ask(catalog, "shop/other", "shop/server", Some(80)).unwrap();
    let refused: Vec<_> =
        explained.paths.iter().map(|path| (path.address.unwrap().to_string(), path.is_refused())).collect();
    assert_eq!(refused, [("10.0.0.2:8080".to_owned(), false), ("10.0.0.4:8080".to_owned(), true)]);
    // The kernel leaves it to the proxy.
    assert!(explained.paths.iter().all(|path| path.enforced_by == Some(EnforcedBy::Source)));
}

#[test]
fn callers_outside_of_the_mesh_arrive_in_plaintext() {
    let refused = path(catalog(), "192.0.2.77", "10.0.0.2", Some(8080));
    assert_eq!((refused.how, refused.told.as_ref().unwrap().ruling.reason), (How::Plaintext, Reason::Strict));
    let mut open = denying();
    let server = Workload { mode: Mode::Permissive, ..workload("server", "10.0.0.2") };
    open.workloads.insert(name("server"), server.into());
    let admitted = path(open.clone(), "192.0.2.77", "10.0.0.2", Some(8080));
    assert!(!admitted.is_refused());
    let off = Workload { mode: Mode::Disabled, ..workload("client", "10.0.0.1") };
    open.workloads.insert(name("client"), off.into());
    let disabled = path(open, "shop/client", "10.0.0.2", Some(8080));
    assert_eq!((disabled.how, disabled.why), (How::Plaintext, "the caller's mode is DISABLED"));
    // Its identity is not proven: the rule about it does not match.
    assert!(!disabled.is_refused());
}

#[test]
fn what_is_not_the_meshs_is_unguarded() {
    assert_eq!(path(catalog(), "shop/client", "203.0.113.1", Some(443)).how, How::Unguarded);
    assert_eq!(path(catalog(), "shop/server", "10.0.0.2", Some(8080)).how, How::Unguarded);
    let mut empty = catalog();
    empty.workloads.remove(&name("server"));
    let nowhere = path(empty, "shop/client", "shop/server", None);
    assert!(nowhere.is_refused() && nowhere.why.contains("no endpoint"));
}

#[test]
fn unclear_questions_say_what_is_missing() {
    for (source, destination, port, part) in [
        ("client", "shop/server", None, "is no source"),
        ("shop/nobody", "shop/server", None, "no workload shop/nobody"),
        ("spiffe://example.org/ns/shop/sa/nobody", "shop/server", None, "no workload of the catalog has the identity"),
        ("spiffe://example.org/shop", "shop/server", None, "is no source"),
        ("shop/client", "server", None, "is no destination"),
        ("shop/client", "shop/nothing", Some(80), "neither a service nor a workload"),
        ("shop/client", "shop/other", None, "name one"),
        ("shop/client", "10.0.0.2", None, "name one"),
    ] {
        let unclear = ask(catalog(), source, destination, port).unwrap_err().to_string();
        assert!(unclear.contains(part), "{unclear}");
    }
    let mut only_service = catalog();
    only_service.workloads.remove(&name("server"));
    let unclear = ask(only_service, "shop/client", "shop/server", Some(81)).unwrap_err().to_string();
    assert_eq!(unclear, "service shop/server has no TCP port 81; it has 80");
    // The workload of the name has every port.
    assert_eq!(path(catalog(), "shop/client", "shop/server", Some(81)).address, Some("10.0.0.2:81".parse().unwrap()));
}

/// The small mesh, whose service has UDP port 53 beside its TCP port, leading to port 1053.
fn with_datagrams(mut catalog: Catalog) -> Catalog {
    let mut service = Service::clone(&catalog.services[&name("server")]);
    service.ports.push(ServicePort {
        name: "dns".into(),
        port: 53,
        protocol: Protocol::Udp,
        target: TargetPort::Number(1053),
    });
    catalog.services.insert(service.name.clone(), service.into());
    catalog
}

#[test]
fn datagrams_are_explained_as_connections_are() {
    let udp = Some(Protocol::Udp);
    for (protocol, destination, port) in [
        (udp, "shop/server", Some(53)),
        (None, "shop/server", Some(53)),
        (udp, "shop/server", None),
        (None, "10.96.0.1", Some(53)),
        (udp, "10.0.0.2", Some(1053)),
    ] {
        let ask = |source| ask_over(protocol, with_datagrams(denying()), source, destination, port).unwrap().paths;
        let [denied] = &ask("shop/client")[..] else { panic!("one path") };
        assert_eq!((denied.protocol, denied.address), (Protocol::Udp, Some("10.0.0.2:1053".parse().unwrap())));
        assert_eq!(denied.how, How::MutualTls { transport: "quic" });
        assert!(denied.is_refused());
        assert_eq!(denied.enforced_by, Some(EnforcedBy::KernelConnect));
        assert!(!ask("shop/other")[0].is_refused());
    }
    let both = ask(with_datagrams(catalog()), "shop/client", "shop/server", None).unwrap().paths;
    let protocols: Vec<_> = both.iter().map(|path| (path.protocol, path.asked.port())).collect();
    assert_eq!(protocols, [(Protocol::Tcp, 80), (Protocol::Udp, 53)]);
}

#[test]
fn datagrams_that_are_not_the_meshs_are_left_alone() {
    let mesh = || with_datagrams(catalog());
    let one = |source, destination, port| {
        ask_over(Some(Protocol::Udp), mesh(), source, destination, Some(port)).unwrap().paths.remove(0)
    };
    let elsewhere = one("shop/client", "10.0.0.2", 1054);
    assert_eq!((elsewhere.how, elsewhere.told.is_none()), (How::Unguarded, true));
    assert!(elsewhere.why.contains("no service leads"), "{}", elsewhere.why);
    let plaintext = one("192.0.2.77", "10.0.0.2", 1053);
    assert_eq!((plaintext.how, plaintext.is_refused()), (How::Plaintext, true));
    let unclear = ask_over(Some(Protocol::Udp), mesh(), "shop/client", "shop/server", Some(54));
    let workload = unclear.unwrap().paths.remove(0);
    assert_eq!((workload.how, workload.asked), (How::Unguarded, "10.0.0.2:54".parse().unwrap()));
}
