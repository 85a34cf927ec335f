//! Broken policies, namespaces and host-network workloads, for the tests of [`super::golden`].

use super::golden::{Golden, Together, with};
use super::{NODE, policy, service};

/// The first lines of a policy, up to its `spec`.
macro_rules! policy_of {
    ($rest:literal) => {
        concat!("apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n", $rest)
    };
}

macro_rules! host_of {
    ($rest:literal) => {
        concat!("apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata: {name: h}\nspec:\n", $rest)
    };
}

/// Wrong in themselves.
pub(super) const ALONE: &[Golden] = &[
    (
        "values of a policy",
        policy_of!("  action: Allow\n  dryRun: yes\n  enforcementLevel: L7\n  rules: [{}]\n  targetRef: {}\n"),
        &[
            ("M0206", 5, 11, "did you mean `ALLOW`?"),
            ("M0205", 6, 11, "`true` or `false`"),
            ("M0206", 7, 21, "`Network`"),
            ("M0203", 9, 3, "did you mean `targetRefs`?"),
        ],
    ),
    (
        "rules about requests",
        policy_of!(
            "  enforcementLevel: Application\n  rules:\n  - methods: [GET]\n    networkAttributes: {ports: [80], paths: [/]}\n  \
             - {hosts: [a]}\n"
        ),
        &[
            ("M0214", 5, 21, "not in this version"),
            ("M0214", 7, 5, "`spec.rules[0].methods`"),
            ("M0214", 8, 38, "`spec.rules[0].networkAttributes.paths`"),
            ("M0214", 9, 6, "`spec.rules[1].hosts`"),
        ],
    ),
    (
        "targets",
        policy_of!(
            "  targetRefs:\n  - {kind: Deployment, name: web}\n  - {kind: Pod, name: web}\n  - {kind: Service, selector: {}}\n  \
             - {kind: Service, name: Web}\n  - {kind: Pod, selector: {matchLabels: {a: 1}}}\n  \
             - {kind: Pod, selector: {matchExpressions: []}}\n  - {group: apps, kind: Service, name: web}\n  \
             - {kind: Pod, selector: {matchLabels: }}\n  - web\n  rules: [{}]\n"
        ),
        &[
            ("M0206", 6, 12, "`Service`"),
            ("M0204", 7, 5, "selector"),
            ("M0219", 7, 17, "by their labels"),
            ("M0204", 8, 5, "name"),
            ("M0219", 8, 21, "`kind: Service`"),
            ("M0207", 9, 27, "Web"),
            ("M0205", 10, 45, "quote it"),
            ("M0203", 11, 28, "matchLabels"),
            ("M0206", 12, 13, "apps"),
            ("M0205", 13, 39, "found nothing"),
            ("M0205", 14, 5, "a mapping"),
        ],
    ),
    (
        "sources",
        policy_of!(
            "  rules:\n  - sources:\n    - {type: SPIFFE, spiffe: 'spiffe://a/b'}\n    - {type: SPIFFE, namespace: shop}\n    \
             - {type: ServiceAccount, serviceAccount: {name: 'web-*'}}\n    - {type: Namespace, namespace: '*'}\n    \
             - {type: CIDR, cidr: 10.0.0.1/8}\n    - {type: Ip, cidr: 10.0.0.0/8}\n    - {namespace: shop}\n  - sources:\n  \
             - sources: []\n"
        ),
        &[
            ("M0215", 7, 30, "no pattern"),
            ("M0204", 8, 7, "spiffe"),
            ("M0219", 8, 22, "one source has one type"),
            ("M0207", 9, 53, "type: SPIFFE"),
            ("M0207", 10, 36, "type: SPIFFE"),
            ("M0209", 11, 26, "write 10.0.0.0/8"),
            ("M0206", 12, 14, "`CIDR`"),
            ("M0204", 13, 7, "type"),
            ("M0205", 14, 12, "found nothing"),
            ("M0218", 15, 14, "nobody"),
        ],
    ),
    (
        "names and ports of rules",
        policy_of!(
            "  rules:\n  - {name: a, networkAttributes: {ports: [0, 80]}}\n  - {name: a, networkAttributes: {ports: []}}\n  \
             - {name: b c, networkAttributes: }\n  - {name: '3'}\n  - {}\n  - {name: '4'}\n"
        ),
        &[
            ("M0210", 6, 43, "0"),
            ("M0216", 7, 12, "line 6"),
            ("M0206", 7, 42, "leave `ports` out"),
            ("M0207", 8, 12, "letters"),
            ("M0205", 8, 34, "found nothing"),
            ("M0216", 11, 12, "line 10"),
        ],
    ),
    ("without rules", policy_of!("  action: ALLOW\n"), &[("M0217", 5, 3, "denies everything")]),
    ("rules that are empty", policy_of!("  action: DENY\n  rules: []\n"), &[("M0217", 6, 3, "does nothing")]),
    ("rules without a value", policy_of!("  rules:\n"), &[("M0205", 5, 8, "found nothing")]),
    (
        "a policy of nowhere",
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: 1}\nspec: {rules: [{}]}\n",
        &[("M0221", 1, 1, "namespace"), ("M0205", 3, 32, "quote it")],
    ),
    (
        "a policy that breaks off before its namespace",
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p\n",
        &[("M0221", 1, 1, "namespace"), ("M0104", 3, 11, "")],
    ),
    (
        "labels of a namespace",
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {nodemesh.io/mode: on, nodemesh.io/default-action: dney}\n",
        &[("M0205", 5, 30, "quote it"), ("M0206", 5, 62, "did you mean `deny`?")],
    ),
    (
        "name of a namespace",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: Shop}\nspec: {finalizers: [kubernetes]}\n",
        &[("M0207", 3, 18, "lower-case")],
    ),
    (
        "authorization of a MeshConfig",
        "apiVersion: nodemesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec:\n  trustDomain: example.org\n  \
         authorization: {defaultAction: refuse, deniedError: EPERM, default: deny}\n",
        &[("M0206", 6, 34, "`allow`"), ("M0206", 6, 55, "`EACCES`"), ("M0203", 6, 62, "`defaultAction`")],
    ),
    (
        "cgroup and netns",
        host_of!(
            "  node: n1\n  addresses: [192.0.2.1]\n  netns: /run/netns/x\n  cgroup: /sys/fs/cgroup/a\n  ports: {http: 80}\n"
        ),
        &[("M0219", 8, 3, "`netns`")],
    ),
    (
        "cgroup without ports",
        host_of!("  node: n1\n  addresses: [192.0.2.1]\n  cgroup: system.slice\n"),
        &[("M0220", 7, 3, "spec.ports"), ("M0206", 7, 11, "absolute")],
    ),
    (
        "the root cgroup",
        host_of!("  node: n1\n  addresses: [192.0.2.1]\n  cgroup: /sys/fs/cgroup/\n  portModes: {80: strict}\n"),
        &[("M0206", 7, 11, "root")],
    ),
    (
        "a detour to a cgroup",
        host_of!("  node: n1\n  addresses: [192.0.2.1]\n  cgroup: /sys/fs/cgroup/a/../b\n  portModes: {80: strict}\n"),
        &[("M0206", 7, 11, "one workload's")],
    ),
];

pub(super) fn host(name: &str, address: &str, cgroup: &str, port: u16) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: shop, labels: \
         {{app: host}}}}\nspec:\n  node: n1\n  addresses: [{address}]\n  cgroup: /sys/fs/cgroup/{cgroup}\n  ports: {{http: {port}}}\n"
    )
}

/// Wrong together with the sound files of [`super::golden`].
pub(super) fn together() -> Vec<Together> {
    let hosts = |second: &str| [host("h1", "192.0.2.1", "a", 80), second.to_owned()].join("---\n");
    vec![
        (
            "another trust domain",
            policy("p", "{rules: [{sources: [{type: SPIFFE, spiffe: 'spiffe://example.com/ns/shop/sa/*'}]}]}"),
            vec![("M0318", "x.yaml", 4, 27, "`example.org`")],
        ),
        (
            "a selector that matches nothing, nearly",
            policy("p", "{rules: [{}], targetRefs: [{kind: Pod, selector: {matchLabels: {app: wbe}}}]}"),
            vec![("M0319", "x.yaml", 4, 34, "did you mean `app: web`?")],
        ),
        (
            "a namespace without workloads",
            with(&policy("p", "{rules: [{}]}"), "namespace: shop", "namespace: shpo"),
            vec![("M0319", "x.yaml", 3, 18, "`shpo`")],
        ),
        (
            "a service that is not there",
            policy("p", "{rules: [{}], targetRefs: [{kind: Service, name: wbe}]}"),
            vec![("M0320", "x.yaml", 4, 34, "did you mean `web`?")],
        ),
        (
            "broken from the start",
            policy("p", "{action: DENY, rules: [{methods: [GET]}]}"),
            vec![("M0321", "x.yaml", 3, 18, "every connection to a workload"), ("M0214", "x.yaml", 4, 31, "methods")],
        ),
        (
            "a port taken",
            hosts(&host("h2", "192.0.2.1", "b", 80)),
            vec![("M0322", "x.yaml", 17, 17, "WorkloadEntry shop/h1")],
        ),
        (
            "a cgroup taken",
            hosts(&host("h2", "192.0.2.1", "a/", 81)),
            vec![("M0323", "x.yaml", 16, 11, "WorkloadEntry shop/h1")],
        ),
        (
            "a host's address that is a pod's",
            host("h1", "10.0.1.1", "a", 80),
            vec![("M0308", "x.yaml", 6, 15, "WorkloadEntry shop/w1")],
        ),
        (
            "a host's address that is another node's",
            [with(&with(NODE, "n1", "n2"), "192.0.2.1", "192.0.2.2"), host("h1", "192.0.2.2", "a", 80)].join("---\n"),
            vec![("M0308", "x.yaml", 11, 15, "Node n2")],
        ),
        (
            "a virtual address that is a host's",
            [host("h1", "192.0.2.1", "a", 80), service("api", "192.0.2.1")].join("---\n"),
            vec![("M0311", "x.yaml", 14, 14, "WorkloadEntry shop/h1")],
        ),
        (
            "an address that the node does not state",
            host("h1", "192.0.2.9", "a", 80),
            vec![("M0324", "x.yaml", 6, 15, "it has 192.0.2.1")],
        ),
        (
            "the service's port instead of the workload's",
            policy(
                "p",
                "{targetRefs: [{kind: Service, name: web}], rules: [{networkAttributes: {ports: [80, 8080]}}]}",
            ),
            vec![("M0325", "x.yaml", 4, 87, "8080")],
        ),
        (
            "an account that nobody has, nearly",
            policy("p", "{rules: [{sources: [{type: ServiceAccount, serviceAccount: {name: defualt}}]}]}"),
            vec![("M0326", "x.yaml", 4, 27, "did you mean `default`?")],
        ),
    ]
}
