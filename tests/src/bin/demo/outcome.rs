//! What happened, put together from all who saw it, and what was expected.

use crate::clients::{self, Traffic};
use crate::refused::{self, Refused};
use crate::scene::{ALLOWING_WEB, CONTROL, DENYING, MARKER, Scene};
use anyhow::{Context, Result};
use mesh_tests::access::Access;
use mesh_tests::daemon::TUNNEL_PORT;
use mesh_tests::report::Capture;
use mesh_tests::wait;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// One row of the table: a client's traffic to one virtual address.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) traffic: Traffic,
    /// The client's own address of this family.
    pub(crate) pod: IpAddr,
    /// The source daemon's account of these connections.
    pub(crate) accesses: Vec<Access>,
    pub(crate) expected_identities: [String; 2],
}

/// One kernel counter of one node.
#[derive(Debug)]
pub(crate) struct KernelCounter {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) count: u64,
}

pub(crate) struct Outcome {
    pub(crate) flows: Vec<Flow>,
    pub(crate) refused: Vec<Refused>,
    pub(crate) capture: Capture,
    pub(crate) counters: Vec<KernelCounter>,
}

/// Something that must be so.
#[derive(Debug)]
pub(crate) struct Expectation {
    pub(crate) text: String,
    pub(crate) met: bool,
}

impl Flow {
    /// The different values of a field of the connections.
    pub(crate) fn distinct<'a>(&'a self, field: impl Fn(&'a Access) -> Option<&'a str>) -> Vec<&'a str> {
        let told = |access: &'a Access| field(access).filter(|value| !value.is_empty()).unwrap_or("?");
        let values: BTreeSet<&str> = self.accesses.iter().map(told).collect();
        values.into_iter().collect()
    }

    pub(crate) fn bytes_sent(&self) -> u64 {
        self.accesses.iter().map(|access| access.bytes_sent).sum()
    }

    pub(crate) fn bytes_received(&self) -> u64 {
        self.accesses.iter().map(|access| access.bytes_recv).sum()
    }

    fn name(&self) -> String {
        format!("{} -> {} ({})", self.traffic.program, self.traffic.service, self.traffic.vip)
    }
}

impl Outcome {
    /// Sends the traffic and collects everybody's account of it.
    pub(crate) fn of(scene: &Scene) -> Result<Self> {
        let traffic = clients::run(scene)?;
        let refused = refused::run(scene)?;
        scene.send_control()?;
        let flows = traffic.into_iter().map(|traffic| flow(scene, traffic)).collect::<Result<Vec<_>>>()?;
        let capture = scene.capture()?;
        let mut counters = Vec::new();
        for daemon in scene.cluster.daemons() {
            let metrics = daemon.metrics()?;
            for sample in metrics.matching("nodemesh_kernel_outcomes_total", &[]).filter(|sample| sample.value > 0.0) {
                let label = |name: &str| sample.labels.get(name).map_or("", String::as_str);
                let name = format!("{} {} ({})", label("hook"), label("reason"), label("verdict"));
                let labels = [("hook", label("hook")), ("reason", label("reason")), ("verdict", label("verdict"))];
                let count = metrics.count(&sample.name, &labels);
                counters.push(KernelCounter { node: daemon.node().to_owned(), name, count });
            }
        }
        Ok(Self { flows, refused, capture, counters })
    }

    /// Everything that is not as it must be makes the demo fail.
    pub(crate) fn expectations(&self) -> Vec<Expectation> {
        let mut all: Vec<Expectation> = self.flows.iter().flat_map(flow_expectations).collect();
        all.extend(self.refused.iter().map(refused_expectation));
        let mut expect = |met: bool, text: String| all.push(Expectation { text, met });
        let markers = |name: &str| self.capture.markers.get(name).copied().unwrap_or_default();
        expect(
            markers(MARKER) == 0,
            format!("no plaintext on the link between the nodes: found {} times", markers(MARKER)),
        );
        expect(
            markers(CONTROL) > 0 && self.capture.lost == 0,
            format!(
                "the wiretap sees everything: plaintext of pods outside of the mesh found {} times, {} packets lost",
                markers(CONTROL),
                self.capture.lost
            ),
        );
        let payload: u64 = self.flows.iter().map(|flow| flow.bytes_sent() + flow.bytes_received()).sum();
        let tunnel = self.capture.bytes_on(TUNNEL_PORT);
        expect(
            tunnel > payload,
            format!("{payload} bytes of the clients crossed the link in {tunnel} bytes of tunnel"),
        );
        let connections: u64 = self.flows.iter().map(|flow| flow.traffic.connections).sum();
        let captured = self.counter("n1", "connect captured");
        expect(
            captured >= connections,
            format!("the kernel captured {captured} connections on n1, of at least {connections} made"),
        );
        all
    }

    fn counter(&self, node: &str, start: &str) -> u64 {
        let matching = self.counters.iter().filter(|counter| counter.node == node && counter.name.starts_with(start));
        matching.map(|counter| counter.count).sum()
    }
}

/// A rule that denies is named; where none allows, the policy that allows others is.
fn refused_expectation(refused: &Refused) -> Expectation {
    let Refused { client, service, vip, errno, bytes_received, by } = refused;
    let (policy, rule) = if *client == "intruder" { (DENYING, "intruder") } else { (ALLOWING_WEB, "-") };
    let is_named = by.as_ref().is_some_and(|ground| {
        (ground.policy.as_str(), ground.rule.as_str(), ground.enforced_by.as_str()) == (policy, rule, "kernel_connect")
    });
    Expectation {
        met: errno == "EACCES" && *bytes_received == 0 && is_named,
        text: format!("{client} -> {service} ({vip}): refused by the kernel with EACCES, in the name of {policy}"),
    }
}

/// Finds a client's connections in the log of its node's daemon, once all of them have ended.
fn flow(scene: &Scene, traffic: Traffic) -> Result<Flow> {
    let daemon = scene.cluster.daemon("n1");
    let pod = scene.cluster.world.pod(traffic.client);
    let pod = if traffic.vip.is_ipv4() { IpAddr::from(pod.v4()) } else { IpAddr::from(pod.v6()) };
    let vip = traffic.vip.to_string();
    let accesses = wait::until("the daemon has logged the client's connections", wait::BOUND, || {
        let own = |access: &Access| {
            access.direction == "outbound"
                && access.destination == vip
                && access.source_workload.as_deref() == Some(traffic.client)
        };
        let accesses: Vec<Access> = daemon.accesses().into_iter().filter(own).collect();
        (accesses.len() as u64 >= traffic.connections).then_some(accesses)
    })
    .with_context(|| format!("{} -> {vip}; the log ends with\n{}", traffic.client, daemon.log_end()))?;
    let expected_identities = [scene.identity(traffic.client), scene.identity(traffic.service)];
    Ok(Flow { traffic, pod, accesses, expected_identities })
}

fn flow_expectations(flow: &Flow) -> Vec<Expectation> {
    let failed = flow.accesses.iter().filter(|access| access.failed()).count();
    let identities = [
        flow.distinct(|access| access.source_identity.as_deref()),
        flow.distinct(|access| access.destination_identity.as_deref()),
    ];
    // QUIC is TLS 1.3 by definition, but its library does not tell group and suite.
    let told = |value: &Option<String>| value.as_deref().is_some_and(|value| !value.is_empty());
    let secure =
        |access: &Access| access.transport.as_deref() == Some("quic") || (told(&access.group) && told(&access.suite));
    let secure = flow.accesses.iter().all(secure);
    let same_node = flow.distinct(|access| access.destination_node.as_deref());
    let strangers = flow.traffic.seen.iter().filter(|ip| **ip != flow.pod).count();
    let name = flow.name();
    [
        (
            failed == 0 && flow.traffic.requests > 0,
            format!("{name}: {} requests answered, {failed} connections failed", flow.traffic.requests),
        ),
        (
            identities.iter().zip(&flow.expected_identities).all(|(seen, expected)| *seen == [expected.as_str()])
                && secure,
            format!("{name}: mutual TLS between exactly the two workloads' identities, on every connection"),
        ),
        (
            flow.distinct(|access| access.verdict.as_deref()) == ["allow"]
                && flow.distinct(|access| access.rule.as_deref()) == [flow.traffic.client],
            format!("{name}: allowed by the rule that names the client"),
        ),
        (same_node == ["n2"], format!("{name}: carried from n1 to n2")),
        (
            strangers == 0 && !flow.traffic.seen.is_empty(),
            format!("{name}: the server saw {} as the client's address, {strangers} times another", flow.pod),
        ),
    ]
    .map(|(met, text)| Expectation { text, met })
    .into()
}
