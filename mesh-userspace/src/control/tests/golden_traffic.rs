//! Broken traffic policies, and the fields of other kinds that go with them, for the tests of [`super::golden`].

use super::golden::{Golden, Together};
use super::traffic;

/// The first lines of a policy for service web, up to the rest of its `spec`, which begins in line 6.
macro_rules! traffic_of {
    ($rest:literal) => {
        concat!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p}\nspec:\n  ",
            "targetRefs: [{kind: Service, name: web}]\n",
            $rest
        )
    };
}

macro_rules! service_of {
    ($rest:literal) => {
        concat!("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n", $rest)
    };
}

/// Wrong in themselves.
pub(super) const ALONE: &[Golden] = &[
    (
        "a misspelt kind",
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolcy\n",
        &[("M0202", 2, 7, "did you mean `TrafficPolicy`?")],
    ),
    (
        "no targets",
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p}\nspec: {targetRef: []}\n",
        &[("M0204", 4, 7, "`targetRef` looks like it"), ("M0203", 4, 8, "`targetRefs`")],
    ),
    (
        "empty targets",
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p}\nspec: {targetRefs: []}\n",
        &[("M0204", 4, 20, "name a service")],
    ),
    (
        "targets",
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p}\nspec:\n  targetRefs:\n  \
         - {kind: Pod, name: web}\n  - {kind: Service}\n  - {kind: Service, name: Web}\n  \
         - {kind: Service, name: web, namespace: other}\n  - {group: apps, kind: Service, name: web}\n  - web\n",
        &[
            ("M0206", 6, 12, "`Service`"),
            ("M0204", 7, 5, "name"),
            ("M0207", 8, 27, "Web"),
            ("M0203", 9, 32, "namespace"),
            ("M0206", 10, 13, "apps"),
            ("M0205", 11, 5, "a mapping"),
        ],
    ),
    (
        "balancing",
        traffic_of!(
            "  loadBalancing: {algorithm: RoundRobbin, slowStart: 2h, preference: samezone, failoverPercent: 101, zone: a}\n  \
             sameNode: kernel\n"
        ),
        &[
            ("M0206", 6, 30, "did you mean `RoundRobin`?"),
            ("M0222", 6, 54, "from 0s to 1h"),
            ("M0206", 6, 70, "did you mean `SameZone`?"),
            ("M0210", 6, 97, "from 0 to 100"),
            ("M0203", 6, 102, "zone"),
            ("M0206", 7, 13, "did you mean `Kernel`?"),
        ],
    ),
    (
        "affinity",
        traffic_of!("  sessionAffinity: {type: ClientIp, timeout: 0s}\n"),
        &[("M0206", 6, 27, "did you mean `ClientIP`?"), ("M0222", 6, 46, "from 1s to 24h")],
    ),
    (
        "affinity's time without affinity",
        traffic_of!("  sessionAffinity: {type: None, timeout: 1h}\n"),
        &[("M0219", 6, 33, "`type: ClientIP`")],
    ),
    ("affinity without type", traffic_of!("  sessionAffinity: {timeout: 1h}\n"), &[("M0204", 6, 20, "type")]),
    (
        "durations",
        traffic_of!("  timeouts: {connect: 5, idle: 1.5h}\n  ejection: {baseTime: \"5\", maxTime: [1s]}\n"),
        &[
            ("M0222", 6, 23, "5s or 5ms"),
            ("M0222", 6, 32, "as in 1m30s"),
            ("M0222", 7, 24, "give it a unit"),
            ("M0205", 7, 38, "must be a duration"),
        ],
    ),
    (
        "times that contradict each other",
        traffic_of!("  ejection: {baseTime: 1m, maxTime: 30s}\n  healthCheck: {interval: 1s, timeout: 2s, tcp: {}}\n"),
        &[("M0222", 6, 13, "shorter than `baseTime`"), ("M0222", 7, 16, "`interval: 2s` at least")],
    ),
    (
        "numbers",
        traffic_of!(
            "  retry: {attempts: 11, budgetPercent: -1, budgetMinimum: many}\n  limits: {maxConnections: 0, maxPending: 1.5}\n  \
             ejection: {consecutiveFailures: 1001, maxPercent: 200}\n"
        ),
        &[
            ("M0210", 6, 21, "from 0 to 10"),
            ("M0210", 6, 40, "-1"),
            ("M0205", 6, 59, "whole number"),
            ("M0210", 7, 28, "from 1 to 1000000"),
            ("M0210", 7, 43, "1.5"),
            ("M0210", 8, 35, "1001"),
            ("M0210", 8, 53, "200"),
        ],
    ),
    (
        "no probe",
        traffic_of!("  healthCheck: {interval: 5s, unhealthyAfter: 0, healthyAfter: 101}\n"),
        &[("M0204", 6, 16, "what to probe"), ("M0210", 6, 47, "from 1 to 100"), ("M0210", 6, 64, "101")],
    ),
    ("two probes", traffic_of!("  healthCheck: {tcp: {}, grpc: {}}\n"), &[("M0219", 6, 26, "more than one probe")]),
    ("a probe that is no mapping", traffic_of!("  healthCheck: {tcp: true}\n"), &[("M0205", 6, 22, "a mapping")]),
    (
        "an http probe",
        traffic_of!("  healthCheck: {http: {path: health, host: \"a b\", port: 80}}\n"),
        &[("M0206", 6, 30, "begins with `/`"), ("M0206", 6, 44, "cannot be sent"), ("M0203", 6, 51, "port")],
    ),
    (
        "an http probe that would be two requests",
        traffic_of!("  healthCheck:\n    http:\n      path: \"/a\\r\\nX: y\"\n"),
        &[("M0206", 8, 13, "cannot be sent")],
    ),
    ("an http probe of nothing", traffic_of!("  healthCheck: {http: {}}\n"), &[("M0204", 6, 23, "path")]),
    ("a grpc probe", traffic_of!("  healthCheck: {grpc: {service: \"a b\"}}\n"), &[("M0206", 6, 33, "shop.Cart")]),
    (
        "a service's distribution",
        service_of!("  trafficDistribution: PreferSameNod\n  ports: [{port: 80}]\n"),
        &[("M0206", 5, 24, "did you mean `PreferSameNode`?")],
    ),
    (
        "a service's affinity",
        service_of!("  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}\n"),
        &[("M0210", 6, 54, "from 1 to 86400")],
    ),
    (
        "a service's affinity without it",
        service_of!("  sessionAffinityConfig: {clientIP: {timeout: 10}}\n"),
        &[("M0219", 5, 3, "`sessionAffinity: ClientIP`"), ("M0203", 5, 38, "timeoutSeconds")],
    ),
    (
        "a mesh's way within a node",
        "apiVersion: nodemesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: a, sameNode: tunnel}\n",
        &[("M0206", 4, 34, "did you mean `Tunnel`?")],
    ),
    (
        "dns of a MeshConfig",
        "apiVersion: nodemesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec:\n  trustDomain: a\n  dns:\n    \
         domain: Cluster.local\n    addresses: [10.0.0.1, 10.0.0.2, 127.0.0.1]\n    \
         upstream: [192.0.2.1, \"192.0.2.1:0\", \"10.0.0.1:53\", \"[fd00::1]:53\"]\n    adress: []\n",
        &[
            ("M0207", 7, 13, "as in cluster.local"),
            ("M0211", 8, 27, "each family"),
            ("M0208", 8, 37, "loopback"),
            ("M0208", 9, 16, "write 192.0.2.1:53"),
            ("M0208", 9, 27, "address and port"),
            ("M0208", 9, 42, "cannot ask itself"),
            ("M0203", 10, 5, "did you mean `addresses`?"),
        ],
    ),
    (
        "dns without addresses",
        "apiVersion: nodemesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec:\n  trustDomain: a\n  dns: {}\n",
        &[("M0204", 6, 8, "spec.dns.addresses")],
    ),
    (
        "dns with no address",
        "apiVersion: nodemesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: a, dns: {addresses: []}}\n",
        &[("M0211", 4, 43, "is empty")],
    ),
    (
        "a terminating workload",
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata: {name: w}\nspec: {node: n1, addresses: [10.0.0.1], terminating: 1}\n",
        &[("M0205", 4, 54, "`true` or `false`")],
    ),
];

/// Wrong together with the sound files of [`super::golden`].
pub(super) fn together() -> Vec<Together> {
    vec![
        (
            "a traffic policy for a service that is not there",
            traffic("p", "{targetRefs: [{kind: Service, name: wbe}]}"),
            vec![("M0320", "x.yaml", 4, 21, "did you mean `web`?")],
        ),
        (
            "two traffic policies for one service",
            [
                traffic("q", "{targetRefs: [{kind: Service, name: web}]}"),
                traffic("p", "{targetRefs: [{kind: Service, name: web}, {kind: Service, name: web}]}"),
            ]
            .join("---\n"),
            vec![("M0327", "x.yaml", 4, 21, "shop/p is in force")],
        ),
    ]
}
