//! Policies and namespaces: what they say, whose defaults hold, and that what is broken closes rather than opens.

use super::*;
use crate::control::resolve::deltas;
use crate::model::{
    AuthorizationPolicy, DefaultAction, DeniedError, Mode, Object, ObjectKey, ObjectName, PolicyAction, PolicyTarget,
    Source, Update, Workload,
};
use std::sync::Arc;

struct Place {
    directory: tempfile::TempDir,
    catalog: Directory,
}

impl Place {
    /// Sound mesh, node and workload `w`, plus these files.
    fn with(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let sound = [("mesh.yaml", MESH), ("node.yaml", NODE), ("w.yaml", &workload("w", "10.0.1.1"))];
        for (file, text) in sound.iter().chain(files) {
            write(directory.path(), file, text);
        }
        let mut catalog = Directory::new(directory.path());
        catalog.scan();
        Self { directory, catalog }
    }

    fn rewrite(&mut self, file: &str, text: &str) {
        write(self.directory.path(), file, text);
        self.catalog.scan();
    }

    fn remove(&mut self, file: &str) {
        std::fs::remove_file(self.directory.path().join(file)).unwrap();
        self.catalog.scan();
    }

    /// What a daemon reads that starts now.
    fn restart(&mut self) {
        self.catalog = Directory::new(self.directory.path());
        self.catalog.scan();
    }

    fn policies(&self) -> Vec<String> {
        self.catalog.catalog().policies.keys().map(ToString::to_string).collect()
    }

    fn policy(&self, name: &str) -> &AuthorizationPolicy {
        let policies = &self.catalog.catalog().policies;
        let name = ObjectName::parse("shop", name).unwrap();
        policies
            .get(&name)
            .unwrap_or_else(|| panic!("no {name} among {:?}: {:?}", self.policies(), self.catalog.diagnostics()))
    }

    fn workload(&self, name: &str) -> &Arc<Workload> {
        &self.catalog.catalog().workloads[&ObjectName::parse("shop", name).unwrap()]
    }

    fn codes(&self) -> Vec<&str> {
        self.catalog.diagnostics().iter().map(|found| found.code.as_str()).collect()
    }
}

/// Denies everything that these targets are, and is no dry run.
fn closes(policy: &AuthorizationPolicy, targets: &[PolicyTarget]) -> bool {
    policy.action == PolicyAction::Allow && policy.rules.is_empty() && !policy.dry_run && policy.targets == targets
}

fn app(name: &str) -> PolicyTarget {
    PolicyTarget::Selector([("app".to_owned(), name.to_owned())].into())
}

#[test]
fn a_policy_says_what_was_written() {
    let full = "\
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop, annotations: {}}
spec:
  targetRefs:
  - {group: '', kind: Pod, selector: {matchLabels: {app: web}}}
  - {kind: Service, name: web}
  action: DENY
  enforcementLevel: Network
  dryRun: true
  rules:
  - name: some
    sources:
    - {type: ServiceAccount, serviceAccount: {namespace: other, name: client}}
    - {type: ServiceAccount, serviceAccount: {name: '*'}}
    - {type: SPIFFE, spiffe: 'spiffe://example.org/ns/shop/sa/c*'}
    - {type: SPIFFE, spiffe: '*'}
    - {type: Namespace, namespace: shop}
    - {type: CIDR, cidr: 10.0.0.0/8}
    networkAttributes: {ports: [80, 443, 80]}
  - sources: []
  - {}
status: {}
";
    let place = Place::with(&[("p.yaml", full)]);
    let policy = place.policy("web");
    assert_eq!((policy.action, policy.dry_run), (PolicyAction::Deny, true));
    assert_eq!(policy.targets, [app("web"), PolicyTarget::Service("web".into())]);
    let [some, nobody, everyone] = &policy.rules[..] else { panic!("{policy:?}") };
    assert_eq!((&*some.name, &*nobody.name, &*everyone.name), ("some", "1", "2"));
    assert_eq!((&some.ports[..], &nobody.sources, &everyone.sources), (&[80, 443][..], &Some(vec![]), &None));
    let sources = some.sources.as_deref().unwrap();
    let account = |namespace: &str, name: Option<&str>| Source::ServiceAccount {
        namespace: namespace.into(),
        name: name.map(Into::into),
    };
    assert_eq!(sources[..2], [account("other", Some("client")), account("shop", None)]);
    assert!(matches!(&sources[2..4], [Source::Spiffe(some), Source::Spiffe(any)] if !some.is_any() && any.is_any()));
    assert_eq!(sources[4..], [Source::Namespace("shop".into()), Source::Range("10.0.0.0/8".parse().unwrap())]);
    // The service is not there, nobody runs as other/client, and a list is empty.
    assert_eq!(place.codes(), ["M0320", "M0326", "M0218"]);
}

#[test]
fn the_nearest_default_holds_and_follows_its_namespace_live() {
    let namespace =
        |labels: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n");
    let own = workload("own", "10.0.1.2")
        .replace("app: web", "app: web, nodemesh.io/mode: permissive, nodemesh.io/default-action: allow");
    let mesh = MESH.replace("example.org", "example.org, mode: strict, authorization: {defaultAction: deny}");
    let mut place = Place::with(&[("own.yaml", &own)]);
    let held = |place: &Place, name: &str| {
        let workload = place.workload(name);
        (workload.mode, workload.default_action)
    };
    assert_eq!(held(&place, "w"), (Mode::Permissive, DefaultAction::Allow));
    place.rewrite("mesh.yaml", &mesh);
    assert_eq!(held(&place, "w"), (Mode::Strict, DefaultAction::Deny));
    place.rewrite("ns.yaml", &namespace("nodemesh.io/mode: disabled"));
    assert_eq!(held(&place, "w"), (Mode::Disabled, DefaultAction::Deny));
    let before = place.catalog.catalog().clone();
    place.rewrite("ns.yaml", &namespace("nodemesh.io/default-action: allow"));
    assert_eq!(held(&place, "w"), (Mode::Strict, DefaultAction::Allow));
    assert_eq!(held(&place, "own"), (Mode::Permissive, DefaultAction::Allow));
    // Of what the namespace changes, and nothing else, the engine is told.
    let told = deltas(&before, place.catalog.catalog());
    assert!(matches!(&told[..], [Update::Upsert(Object::Workload(w))] if w.name.name() == "w"), "{told:?}");
    assert_eq!(crate::control::count(place.catalog.resolver())["Namespace"], 1);
    place.remove("ns.yaml");
    assert_eq!(held(&place, "w"), (Mode::Strict, DefaultAction::Deny));
    let mesh = place.catalog.catalog().mesh.as_ref().unwrap();
    assert_eq!((mesh.default_action, mesh.denied_error), (DefaultAction::Deny, DeniedError::AccessDenied));
}

#[test]
fn a_policy_that_breaks_keeps_its_last_good_version() {
    let good = policy("web", "{rules: [{sources: [{type: Namespace, namespace: shop}]}]}");
    let mut place = Place::with(&[("p.yaml", &good)]);
    let before = place.policy("web").clone();
    let misspelt = good.replace("sources", "source");
    let nameless = good.replace("name: web", "name: Web");
    let torn = &good[..good.len() - 4];
    let mistyped = good.replace("AuthorizationPolicy", "AuthorisationPolicy");
    for broken in [&*misspelt, &nameless, torn, &mistyped, "", "}{"] {
        place.rewrite("p.yaml", broken);
        assert_eq!((place.policies(), place.policy("web")), (vec!["shop/web".into()], &before), "{broken}");
        assert!(!errors(&place.catalog).is_empty() && !place.codes().contains(&"M0321"), "{broken}");
    }
    // Broken in another file now: that it was good there still counts.
    std::fs::remove_file(place.directory.path().join("p.yaml")).unwrap();
    place.rewrite("q.yaml", &misspelt);
    assert_eq!(place.policy("web"), &before);
    place.rewrite("q.yaml", "# gone\n");
    assert!(place.policies().is_empty());
}

#[test]
fn a_policy_that_never_was_good_denies_what_it_targets() {
    let targets = "targetRefs: [{kind: Pod, selector: {matchLabels: {app: web}}}]";
    let broken = |rest: &str| policy("web", &format!("{{{targets}, {rest}}}"));
    let spoilt = policy("web", "{targetRefs: [{kind: Pod, selector: {matchLabels: {app: 1}}}], rules: [{}]}");
    let half = format!("{}spec:\n  {targets}\n  rules: [{{sources: [", policy("web", "").replace("spec: \n", ""));
    let torn = half.replace("matchLabels: {app: web}}}]", "matchLabels: {app: web");
    for (text, expected) in [
        (broken("rules: [{source: []}]"), vec![app("web")]),
        (broken("action: DENY, rules: [{methods: [GET]}]"), vec![app("web")]),
        (broken("action: Deny, rules: [{}]"), vec![app("web")]),
        (broken("rules: [{}]").replace("v1alpha1", "v1beta1"), vec![app("web")]),
        (broken("rules: [{}]").replace("AuthorizationPolicy", "AuthorizationPolcy"), vec![app("web")]),
        (broken("rules: [{}]").replace("kind: A", "kind: &a A"), vec![]),
        (half, vec![app("web")]),
        // What is only half there might have been more.
        (torn, vec![]),
        (spoilt, vec![]),
        (policy("web", "{rules: 1}"), vec![]),
        (policy("web", "nothing"), vec![]),
    ] {
        let mut place = Place::with(&[("p.yaml", &text)]);
        if text.contains("&a") {
            // Not even its kind can be read.
            assert!(place.policies().is_empty());
            continue;
        }
        assert!(closes(place.policy("web"), &expected), "{text}\n{:?}", place.policy("web"));
        assert_eq!(place.codes().iter().filter(|code| **code == "M0321").count(), 1, "{text}");
        // Again, and after a file that cannot be read at all: it stays closed.
        for text in [format!("{text} "), "}{".to_owned(), text.clone()] {
            place.rewrite("p.yaml", &text);
            assert!(closes(place.policy("web"), &expected), "{text}");
        }
        // Mended, it is what it says.
        place.rewrite("p.yaml", &broken("action: DENY, rules: [{}]"));
        assert_eq!((place.policy("web").action, place.policies().len()), (PolicyAction::Deny, 1));
        assert!(errors(&place.catalog).is_empty());
    }
}

#[test]
fn what_plainly_enforces_nothing_is_not_made_to() {
    for (spec, action, dry_run) in [
        ("{dryRun: true, rules: [{methods: [GET]}]}", PolicyAction::Allow, true),
        ("{action: AUDIT, rules: [{methods: [GET]}]}", PolicyAction::Audit, false),
        ("{dryRun: perhaps, rules: [{}]}", PolicyAction::Allow, false),
    ] {
        let place = Place::with(&[("p.yaml", &policy("web", spec))]);
        let standing = place.policy("web");
        assert_eq!((standing.action, standing.dry_run, standing.rules.len()), (action, dry_run, 0), "{spec}");
    }
}

#[test]
fn a_policy_that_has_lost_its_name_still_closes_its_namespace() {
    let nameless = policy("web", "{rules: [{}]}").replace("name: web", "name: Web");
    let mut place = Place::with(&[("Some file.yaml", &nameless)]);
    assert_eq!(place.policies(), ["shop/unnamed.some-file-yaml.1"]);
    assert!(closes(place.policy("unnamed.some-file-yaml.1"), &[]));
    // A good one beside it does not answer for it, one that it may be does.
    let other = policy("other", "{rules: [{}]}");
    place.rewrite("Some file.yaml", &[other.clone(), nameless.clone()].join("---\n"));
    assert_eq!(place.policies(), ["shop/other", "shop/unnamed.some-file-yaml.6"]);
    place.rewrite("Some file.yaml", &[other.clone(), policy("web", "{rules: [{}]}")].join("---\n"));
    place.rewrite("Some file.yaml", &[other, nameless.clone()].join("---\n"));
    assert_eq!(place.policies(), ["shop/other", "shop/web"]);
    place.restart();
    assert_eq!(place.policies(), ["shop/other", "shop/unnamed.some-file-yaml.6"]);
    // Without a namespace there is nothing to close, and that is said.
    place.rewrite("Some file.yaml", &nameless.replace("namespace: shop", "namespace: [shop]"));
    place.restart();
    assert!(place.policies().is_empty() && place.codes().contains(&"M0221"), "{:?}", place.codes());
}

#[test]
fn a_good_version_elsewhere_needs_no_stand_in() {
    let good = policy("web", "{rules: [{}]}");
    let broken = policy("web", "{rules: [{paths: [/]}]}");
    let place = Place::with(&[("a.yaml", &broken), ("b.yaml", &good)]);
    assert_eq!((place.policy("web").rules.len(), place.codes()), (1, vec!["M0214"]));
    let place = Place::with(&[("a.yaml", &[broken, good].join("---\n"))]);
    assert_eq!((place.policy("web").rules.len(), place.codes()), (1, vec!["M0214"]));
}

#[test]
fn a_broken_namespace_is_strict_where_it_cannot_be_read() {
    let namespace = |metadata: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {metadata}\n");
    let strict = (Mode::Strict, DefaultAction::Deny);
    for (metadata, expected) in [
        ("{name: shop, labels: {nodemesh.io/mode: srtict}}", (Mode::Strict, DefaultAction::Allow)),
        ("{name: shop, labels: {nodemesh.io/default-action: no}}", (Mode::Permissive, DefaultAction::Deny)),
        ("{name: shop, labels: [nodemesh.io/default-action: deny]}", strict),
        ("{name: shop, labels: {nodemesh.io/mode: permissive, x: [", (Mode::Permissive, DefaultAction::Deny)),
        ("{name: shop, uid: [", strict),
        ("{name: shop, uid: 1}", (Mode::Permissive, DefaultAction::Allow)),
    ] {
        let mut place = Place::with(&[("ns.yaml", &namespace(metadata))]);
        let held = place.workload("w");
        assert_eq!((held.mode, held.default_action), expected, "{metadata}");
        assert!(place.codes().contains(&"M0321"), "{metadata}");
        // What was good before stays instead.
        place.rewrite("ns.yaml", &namespace("{name: shop, labels: {nodemesh.io/mode: disabled}}"));
        place.rewrite("ns.yaml", &namespace(metadata));
        assert_eq!(place.workload("w").mode, Mode::Disabled, "{metadata}");
    }
}

#[test]
fn policies_are_told_before_the_workloads_they_protect() {
    let place = Place::with(&[("p.yaml", &policy("web", "{rules: [{}]}"))]);
    let told = deltas(&crate::model::Catalog::default(), place.catalog.catalog());
    let position = |wanted: fn(&Update) -> bool| told.iter().position(wanted).unwrap();
    let policy = position(|update| matches!(update, Update::Upsert(Object::Policy(_))));
    assert!(policy < position(|update| matches!(update, Update::Upsert(Object::Workload(_)))));
    let mut without = place.catalog.catalog().clone();
    without.policies.clear();
    let key = ObjectKey::Policy(ObjectName::parse("shop", "web").unwrap());
    assert_eq!(deltas(place.catalog.catalog(), &without), [Update::Remove(key)]);
    assert_eq!(crate::control::count(place.catalog.resolver())["AuthorizationPolicy"], 1);
}

#[test]
fn host_workloads_share_their_nodes_address_by_port() {
    let host = super::golden_policy::host;
    let both = [host("h1", "192.0.2.1", "a", 80), host("h2", "192.0.2.1", "b/c", 81)].join("---\n");
    let mut place = Place::with(&[("h.yaml", &both)]);
    assert_eq!(place.codes(), [""; 0], "{:?}", place.catalog.diagnostics());
    let second = place.workload("h2");
    assert_eq!(second.cgroup.as_deref(), Some(Path::new("/sys/fs/cgroup/b/c")));
    assert!(second.is_host_network() && second.declared_ports().contains(&81) && second.netns.is_none());
    // A newcomer that takes a port of theirs is refused, and so is a pod at their address.
    place.rewrite("a.yaml", &host("a", "192.0.2.1", "d", 81));
    place.rewrite("b.yaml", &workload("b", "192.0.2.1"));
    assert_eq!(errors(&place.catalog), [("M0322", "a.yaml", 8, 17), ("M0308", "b.yaml", 6, 15)]);
    assert_eq!(place.catalog.catalog().workloads.len(), 3);
    place.remove("h.yaml");
    assert_eq!(errors(&place.catalog), [("M0308", "b.yaml", 6, 15)]);
}
