//! Broken documents, each with the code and the place that its author must be shown.

use super::super::{Code, Diagnostic, has_errors, parse_documents, validate};
use super::{MESH, NODE, golden_policy, places, service, workload, write};
use std::collections::BTreeSet;

/// A document (or several) and what is wrong in it: code, line, column, and a word of the message or help.
pub(super) type Golden = (&'static str, &'static str, &'static [(&'static str, u32, u32, &'static str)]);

/// Wrong in themselves.
const ALONE: &[Golden] = &[
    ("not closed", "apiVersion: v1\nspec: [1, 2\n", &[("M0104", 2, 7, "unclosed")]),
    ("tab", "apiVersion: v1\nspec:\n\tports: []\n", &[("M0104", 3, 2, "spaces")]),
    ("bad indent", "apiVersion: v1\n  kind: Service\n", &[("M0104", 2, 7, "")]),
    ("duplicate key", "kind: A\napiVersion: v1\nkind: B\n", &[("M0107", 3, 1, "line 1")]),
    ("alias", "kind: &k Service\napiVersion: *k\n", &[("M0108", 1, 10, "anchor")]),
    ("scalar", "just text\n", &[("M0201", 1, 1, "mapping")]),
    ("list", "- kind: Service\n", &[("M0201", 1, 1, "mapping")]),
    ("no kind", "apiVersion: v1\n", &[("M0204", 1, 1, "`kind` is missing")]),
    ("misspelt kind", "apiVersion: v1\nkind: Servce\n", &[("M0202", 2, 7, "`Service`")]),
    ("kind of elsewhere", "apiVersion: apps/v1\nkind: Deployment\n", &[("M0202", 2, 7, "`WorkloadEntry`")]),
    ("wrong version", "apiVersion: v1\nkind: MeshConfig\n", &[("M0202", 1, 13, "nodemesh.io/v1alpha1")]),
    (
        "no metadata and no spec",
        "apiVersion: v1\nkind: Service\n",
        &[("M0204", 1, 1, "`metadata`"), ("M0204", 1, 1, "`spec`")],
    ),
    (
        "misspelt metadata",
        "apiVersion: v1\nkind: Service\nmetdata: {name: x}\nspec: {}\n",
        &[("M0204", 1, 1, "`metdata` looks like it"), ("M0203", 3, 1, "`metadata`")],
    ),
    (
        "name in capitals",
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: Cart\nspec: {}\n",
        &[("M0207", 4, 9, "lower-case")],
    ),
    (
        "number as name",
        "apiVersion: v1\nkind: Node\nmetadata: {name: 1}\nstatus: {addresses: []}\n",
        &[("M0205", 3, 18, "quote it: \"1\"")],
    ),
    (
        "boolean label",
        "apiVersion: v1\nkind: Service\nmetadata: {name: a, labels: {x: yes}}\nspec: {}\n",
        &[("M0205", 3, 33, "quote it: \"yes\"")],
    ),
    (
        "misspelt field of a Service",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec:\n  selectr: {app: cart}\n",
        &[("M0203", 5, 3, "did you mean `selector`?")],
    ),
    (
        "misspelt field of a port",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec:\n  ports:\n  - port: 80\n    targetport: 8080\n",
        &[("M0203", 7, 5, "did you mean `targetPort`?")],
    ),
    (
        "a port without number",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec: {ports: [{name: http}]}\n",
        &[("M0204", 4, 16, "spec.ports[0].port")],
    ),
    (
        "port out of range",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec: {ports: [{port: 70000}]}\n",
        &[("M0210", 4, 23, "65535")],
    ),
    (
        "quoted port",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec: {ports: [{port: \"80\", targetPort: \"80\"}]}\n",
        &[("M0205", 4, 23, "without quotes: 80"), ("M0207", 4, 41, "without quotes: 80")],
    ),
    (
        "protocol",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec: {ports: [{port: 80, protocol: tcp}]}\n",
        &[("M0206", 4, 37, "did you mean `TCP`?")],
    ),
    (
        "udp",
        "apiVersion: v1\nkind: Service\nmetadata: {name: dns}\nspec: {ports: [{port: 53, protocol: SCTP}]}\n",
        &[("M0213", 4, 37, "only TCP and UDP")],
    ),
    (
        "ports twice",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec:\n  ports:\n  - {name: a, port: 80}\n  - {name: a, port: 80}\n",
        &[("M0212", 7, 12, "`a`"), ("M0212", 7, 21, "port 80")],
    ),
    (
        "several ports without names",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec:\n  ports:\n  - port: 80\n  - port: 81\n",
        &[("M0204", 6, 5, "name"), ("M0204", 7, 5, "name")],
    ),
    (
        "virtual addresses",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec:\n  clusterIPs: [10.0.0.256, 10.0.0.1, 10.0.0.2, 127.0.0.1]\n",
        &[("M0208", 5, 16, "not an IP"), ("M0211", 5, 38, "each family"), ("M0208", 5, 48, "loopback")],
    ),
    (
        "address with prefix",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec: {clusterIP: 10.0.0.1/32}\n",
        &[("M0208", 4, 19, "prefix length")],
    ),
    (
        "mapped address",
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart}\nspec: {clusterIP: \"::ffff:10.0.0.1\"}\n",
        &[("M0208", 4, 19, "write 10.0.0.1")],
    ),
    (
        "node address type",
        "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nstatus: {addresses: [{type: InternalIp, address: 192.0.2.1}]}\n",
        &[("M0206", 4, 29, "did you mean `InternalIP`?")],
    ),
    (
        "empty WorkloadEntry",
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata: {name: w}\nspec: {}\n",
        &[("M0204", 4, 7, "spec.node"), ("M0204", 4, 7, "spec.addresses")],
    ),
    (
        "addresses that are no list",
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata: {name: w}\nspec: {node: n1, addresses: 10.0.0.1}\n",
        &[("M0205", 4, 29, "must be a list, found a string")],
    ),
    (
        "no address",
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata: {name: w}\nspec: {node: n1, addresses: []}\n",
        &[("M0211", 4, 29, "empty")],
    ),
    (
        "values of a WorkloadEntry",
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata:\n  name: w\n  labels: {nodemesh.io/mode: srtict}\nspec:\n  \
         node: N1\n  addresses: [10.0.0.1]\n  serviceAccount: a/b\n  netns: web\n  weight: -1\n  ports: {HTTP: 80, ok: 0}\n  \
         portModes: {\"8080\": off, 99999: strict, 8081: strict, \"08081\": strict}\n",
        &[
            ("M0206", 5, 30, "did you mean `strict`?"),
            ("M0207", 7, 9, "N1"),
            ("M0207", 9, 19, "a/b"),
            ("M0206", 10, 10, "absolute"),
            ("M0210", 11, 11, "-1"),
            ("M0207", 12, 11, "HTTP"),
            ("M0210", 12, 25, "0"),
            ("M0205", 13, 23, "quote it"),
            ("M0210", 13, 28, "99999"),
            ("M0212", 13, 57, "8081"),
        ],
    ),
    (
        "values of a MeshConfig",
        "apiVersion: nodemesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec:\n  trustDomain: Example.org\n  \
         transport: laned\n  mode: loose\n  excludeCIDRs: [10.0.0.1/8, 10.0.0.1, x, \"::ffff:0:0/96\"]\n  excludedCIDRs: []\n",
        &[
            ("M0207", 5, 16, "lower-case"),
            ("M0206", 6, 14, "did you mean `lanes`?"),
            ("M0206", 7, 9, "`permissive`"),
            ("M0209", 8, 18, "write 10.0.0.0/8"),
            ("M0209", 8, 30, "write 10.0.0.1/32"),
            ("M0209", 8, 40, "not an address range"),
            ("M0209", 8, 43, "as IPv4"),
            ("M0203", 9, 3, "did you mean `excludeCIDRs`?"),
        ],
    ),
];

/// What differs from what is expected, empty if nothing does.
fn mismatch(what: &str, found: &[Diagnostic], expected: &[(&str, u32, u32, &str)]) -> String {
    let mut sorted: Vec<&Diagnostic> = found.iter().collect();
    sorted.sort_by_key(|found| (found.line, found.column));
    let places: Vec<_> = sorted.iter().map(|found| (found.code.as_str(), found.line, found.column)).collect();
    let wanted: Vec<_> = expected.iter().map(|(code, line, column, _)| (*code, *line, *column)).collect();
    let said = sorted.iter().zip(expected).all(|(found, (.., word))| found.render().contains(word));
    if places == wanted && said {
        return String::new();
    }
    let rendered: String = sorted.iter().map(|found| found.render()).collect();
    format!("{what}: expected {expected:?}, found {places:?}\n{rendered}\n")
}

#[test]
fn what_is_wrong_in_itself_is_shown_at_its_place() {
    let mut mismatches = String::new();
    for (what, text, expected) in ALONE.iter().chain(golden_policy::ALONE) {
        let contents = parse_documents("a.yaml", text.as_bytes());
        mismatches += &mismatch(what, contents.diagnostics(), expected);
        assert_eq!(contents.is_empty(), has_errors(contents.diagnostics()), "{what}");
    }
    assert!(mismatches.is_empty(), "{mismatches}");
}

#[test]
fn what_is_wrong_with_a_file_names_the_file() {
    let big = vec![b'#'; (4 << 20) + 1];
    for (bytes, code) in [(&b""[..], "M0105"), (&b"a: \xff\n"[..], "M0103"), (&big[..], "M0102")] {
        let contents = parse_documents("a.yaml", bytes);
        assert_eq!(places(contents.diagnostics()), [(code, "a.yaml", 0, 0)]);
    }
    assert!(parse_documents("a.yaml", b"# nothing yet\n").diagnostics().is_empty());
}

/// What is done, the text of `x.yaml`, and the findings: code, file, line, column, and a word of it.
pub(super) type Together = (&'static str, String, Vec<(&'static str, &'static str, u32, u32, &'static str)>);

/// Wrong together with the sound files `mesh.yaml`, `node.yaml`, `web.yaml` (service, 10.96.0.1) and `w1.yaml`
/// (workload, 10.0.1.1); the text is that of `x.yaml`.
fn together() -> Vec<Together> {
    [collisions(), dangling(), golden_policy::together()].concat()
}

pub(super) fn with(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in {text}");
    text.replace(from, to)
}

/// Two that want the same.
fn collisions() -> Vec<Together> {
    vec![
        ("defined twice", service("web", "10.96.0.9"), vec![("M0301", "x.yaml", 3, 18, "web.yaml:3")]),
        ("two meshes", with(MESH, "name: mesh", "name: more"), vec![("M0302", "x.yaml", 3, 18, "mesh.yaml:3")]),
        ("virtual address taken", service("api", "10.96.0.1"), vec![("M0307", "x.yaml", 5, 14, "Service shop/web")]),
        ("address taken", workload("w2", "10.0.1.1"), vec![("M0308", "x.yaml", 6, 15, "WorkloadEntry shop/w1")]),
        ("address is virtual", workload("w2", "10.96.0.1"), vec![("M0311", "x.yaml", 6, 15, "Service shop/web")]),
        (
            "virtual address is a workload's",
            service("api", "10.0.1.1"),
            vec![("M0311", "x.yaml", 5, 14, "WorkloadEntry shop/w1")],
        ),
        (
            "uid taken",
            with(&workload("w2", "10.0.1.2"), "name: w2,", "name: w2, uid: shop/w1,"),
            vec![("M0312", "x.yaml", 3, 27, "shop/w1")],
        ),
        ("node address taken", with(NODE, "n1", "n2"), vec![("M0317", "x.yaml", 4, 50, "Node n1")]),
    ]
}

/// References that lead nowhere, or not where they should.
fn dangling() -> Vec<Together> {
    vec![
        (
            "unknown node",
            with(&workload("w2", "10.0.1.2"), "node: n1", "node: n2"),
            vec![("M0304", "x.yaml", 5, 9, "did you mean `n1`?")],
        ),
        (
            "selects nothing, nearly",
            with(&service("api", "10.96.0.2"), "app: web", "app: webb"),
            vec![("M0305", "x.yaml", 6, 3, "did you mean `app: web`?")],
        ),
        (
            "selects elsewhere",
            with(&service("api", "10.96.0.2"), "namespace: shop", "namespace: shpo"),
            vec![("M0305", "x.yaml", 6, 3, "another namespace")],
        ),
        (
            "no selector",
            with(&service("api", "10.96.0.2"), "  selector: {app: web}\n", ""),
            vec![("M0305", "x.yaml", 5, 3, "no selector")],
        ),
        (
            "unknown target port",
            with(&service("api", "10.96.0.2"), "targetPort: http", "targetPort: htpp"),
            vec![("M0306", "x.yaml", 8, 28, "did you mean `http`?")],
        ),
        (
            "selected but disabled",
            with(&workload("w2", "10.0.1.2"), "{app: web}", "{app: web, nodemesh.io/mode: disabled}"),
            vec![("M0313", "web.yaml", 6, 3, "shop/w2")],
        ),
        (
            "node without address",
            with(&with(NODE, "n1", "n2"), "InternalIP", "ExternalIP"),
            vec![("M0314", "x.yaml", 3, 18, "InternalIP")],
        ),
        (
            "one lacks the port",
            with(&workload("w2", "10.0.1.2"), "http: 8080", "grpc: 8080"),
            vec![("M0315", "web.yaml", 8, 28, "shop/w2")],
        ),
        ("no endpoint of the family", service("api", "fd00::2"), vec![("M0316", "x.yaml", 5, 14, "IPv6")]),
    ]
}

fn sound_catalog() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("mesh", MESH.into()),
        ("node", NODE.into()),
        ("web", service("web", "10.96.0.1")),
        ("w1", workload("w1", "10.0.1.1")),
    ] {
        write(directory.path(), &format!("{file}.yaml"), &text);
    }
    directory
}

#[test]
fn what_is_wrong_between_objects_is_shown_where_it_was_written() {
    for (what, text, expected) in together() {
        let directory = sound_catalog();
        assert_eq!(validate(directory.path()), [], "{what}");
        write(directory.path(), "x.yaml", &text);
        let found = validate(directory.path());
        let wanted: Vec<_> =
            expected.iter().map(|(code, file, line, column, _)| (*code, *file, *line, *column)).collect();
        let rendered: String = found.iter().map(Diagnostic::render).collect();
        assert_eq!(places(&found), wanted, "{what}:\n{rendered}");
        for (found, (.., word)) in found.iter().zip(expected) {
            assert!(found.render().contains(word), "{what}: {word:?} is not in\n{}", found.render());
        }
    }
}

#[test]
fn excluded_ranges_are_weighed_against_what_lies_in_them() {
    let directory = sound_catalog();
    let mesh = MESH.replace("example.org", "example.org, excludeCIDRs: [10.96.0.0/16, 10.0.1.1/32]");
    write(directory.path(), "mesh.yaml", &mesh);
    let found = validate(directory.path());
    assert_eq!(places(&found), [("M0310", "w1.yaml", 6, 15), ("M0309", "web.yaml", 5, 14)]);
    assert!(!has_errors(&found));
}

#[test]
fn a_catalog_without_mesh_config_or_without_directory_says_so() {
    let directory = sound_catalog();
    std::fs::remove_file(directory.path().join("mesh.yaml")).unwrap();
    let found = validate(directory.path());
    assert_eq!(places(&found)[0], ("M0303", ".", 0, 0));
    assert_eq!(places(&validate(&directory.path().join("missing")))[0], ("M0100", ".", 0, 0));
}

#[test]
fn one_file_is_checked_by_itself() {
    let directory = sound_catalog();
    assert_eq!(validate(&directory.path().join("web.yaml")), []);
    write(directory.path(), "x.yaml", "kind: [");
    let found = validate(&directory.path().join("x.yaml"));
    assert_eq!(found.iter().map(|found| found.code).collect::<Vec<_>>(), [Code::Syntax]);
}

#[test]
fn every_code_has_a_golden_document() {
    let alone = ALONE.iter().chain(golden_policy::ALONE);
    let mut shown: BTreeSet<&str> = alone.flat_map(|(.., found)| found.iter().map(|found| found.0)).collect();
    shown.extend(together().iter().flat_map(|(.., found)| found.iter().map(|found| found.0).collect::<Vec<_>>()));
    let elsewhere = ["M0100", "M0101", "M0102", "M0103", "M0105", "M0106", "M0109", "M0303", "M0309", "M0310"];
    let missing: Vec<_> =
        Code::ALL.iter().filter(|code| !shown.contains(code.as_str()) && !elsewhere.contains(&code.as_str())).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_example_in_the_reference_is_sound() {
    let reference = include_str!("../../../../docs/CATALOG.md");
    let examples: Vec<_> = reference.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(examples.len() >= 9);
    for example in examples {
        let contents = parse_documents("CATALOG.md", example.as_bytes());
        assert_eq!((contents.diagnostics(), contents.is_empty()), (&[][..], false), "{example}");
    }
}

#[test]
fn manifests_as_kubernetes_writes_them_are_read() {
    let exported = include_str!("../../../../tests/fuzz/corpus/catalog/exported.yaml");
    let contents = parse_documents("exported.yaml", exported.as_bytes());
    assert_eq!(contents.diagnostics(), []);
    assert_eq!(contents.len(), 3);
}
