//! The parser against bytes that nobody meant: mutations of the committed seeds, always the same ones.

use super::super::directory::Directory;
use super::super::document::Spec;
use super::super::{Severity, parse_documents};
use super::{MESH, NODE, policy, workload, write};
use crate::model::{PolicyAction, SpiffePattern};
use std::path::Path;

const ITERATIONS: usize = 5_000;

/// Of those that write a file each.
const SCANS: usize = 1_000;

/// xorshift64*: fixed seed, so that a failure is the same failure tomorrow.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap()
    }
}

/// Pieces that mean something to YAML, or to us.
const TOKENS: &[&str] = &[
    "---\n",
    "...\n",
    "&a ",
    "*a",
    "!!str ",
    "<<: ",
    "|\n",
    ">-\n",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "? ",
    "'",
    "\"",
    "#",
    "%YAML 1.1\n",
    "\t",
    "\r\n",
    "\u{feff}",
    "\u{2028}",
    "\0",
    "null",
    "~",
    "0x",
    "-1",
    "99999999999999999999",
    "kind: Service\n",
    "spec:\n",
    "10.0.0.1",
    "::ffff:1.2.3.4",
    "0.0.0.0/0",
    "kind: AuthorizationPolicy\n",
    "metadata: {name: web, namespace: shop}\n",
    "rules:\n",
    "sources: []",
    "'*'",
    "spiffe://",
    "dryRun: true\n",
    "kind: TrafficPolicy\n",
    "targetRefs: [{kind: Service, name: web}]\n",
    "1m30s",
    "99999h99999h",
];

fn mutate(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() + 1);
        let to = (at + random.below(40)).min(bytes.len());
        match random.below(7) {
            0 => drop(bytes.drain(at..to)),
            1 => {
                let piece = bytes[at..to].to_vec();
                bytes.splice(at..at, piece);
            }
            2 => {
                let token = TOKENS[random.below(TOKENS.len())];
                bytes.splice(at..at, token.bytes());
            }
            3 if at < bytes.len() => bytes[at] = random.next().to_le_bytes()[0],
            4 => bytes.truncate(at),
            5 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len() + 1);
                bytes.splice(at..to, other[from..].iter().copied());
            }
            _ => {
                let token = TOKENS[random.below(TOKENS.len())].repeat(random.below(200));
                bytes.splice(at..at, token.bytes());
            }
        }
    }
    bytes
}

/// A committed corpus, always in the same order.
fn seeds(corpus: &str) -> Vec<Vec<u8>> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(corpus);
    let mut paths: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 6, "seeds are missing from {}", corpus.display());
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn hostile_policies_are_refused_whole() {
    for (seed, objects) in [("patterns", 0), ("widening", 0), ("torn", 0), ("names", 0)] {
        let path = format!("{}/../tests/fuzz/corpus/policy/hostile-{seed}.yaml", env!("CARGO_MANIFEST_DIR"));
        let contents = parse_documents("hostile.yaml", &std::fs::read(path).unwrap());
        assert_eq!((contents.len(), contents.has_broken()), (objects, true), "{seed}: {:?}", contents.diagnostics());
    }
}

#[test]
fn no_bytes_open_what_a_policy_closes() {
    let seeds = seeds("policy");
    let mut random = Random(0x706f_6c69_6379);
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in [("mesh.yaml", MESH), ("node.yaml", NODE), ("w.yaml", &workload("w", "10.0.1.1"))] {
        write(folder.path(), file, text);
    }
    let good = policy("web", "{rules: [{sources: [{type: Namespace, namespace: shop}]}]}");
    let (mut stood_in, mut kept) = (0, 0);
    for iteration in 0..SCANS {
        let bytes = mutate(&seeds, &mut random);
        let shown = String::from_utf8_lossy(&bytes);
        for text in shown.split('\'') {
            if let Ok(pattern) = SpiffePattern::parse(text) {
                assert_eq!(pattern.to_string(), text);
            }
        }
        let contents = parse_documents("p.yaml", &bytes);
        let mut directory = Directory::new(folder.path());
        let was_good = iteration % 2 == 0;
        let path = folder.path().join("p.yaml");
        // Made anew rather than overwritten: file systems flush what replaces a file's contents.
        let _ = std::fs::remove_file(&path);
        if was_good {
            write(folder.path(), "p.yaml", &good);
            directory.scan();
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::write(&path, &bytes).unwrap();
        directory.scan();
        let policies = &directory.catalog().policies;
        for broken in &contents.broken {
            // Whatever may be the policy that was there leaves it there.
            if was_good && broken.key.is_none() {
                assert!(policies.keys().any(|name| name.to_string() == "shop/web"), "{iteration}: {shown}");
                kept += 1;
            }
            let Some(standing) = &broken.stand_in else { continue };
            let Spec::Policy(strictest) = &standing.spec else { continue };
            let strictest = &strictest.policy;
            assert!(strictest.rules.is_empty() && strictest.action != PolicyAction::Deny, "{iteration}: {shown}");
            let namespace = strictest.name.namespace();
            assert!(policies.keys().any(|name| name.namespace() == namespace), "{iteration}: {shown}");
            stood_in += 1;
        }
    }
    assert!(stood_in > SCANS / 16 && kept > SCANS / 32, "the mutations are one-sided: {stood_in} {kept}");
}

#[test]
fn no_bytes_make_the_parser_panic_or_lose_its_place() {
    let seeds = [seeds("catalog"), seeds("policy")].concat();
    let mut random = Random(0x6e6f_6465_6d65_7368);
    let (mut sound, mut broken) = (0, 0);
    for iteration in 0..ITERATIONS {
        let bytes = mutate(&seeds, &mut random);
        let contents = parse_documents("fuzz.yaml", &bytes);
        let errors = contents.diagnostics().iter().filter(|d| d.severity == Severity::Error).count();
        assert_eq!(errors > 0, contents.has_broken(), "{iteration}: {:?}", String::from_utf8_lossy(&bytes));
        for diagnostic in contents.diagnostics() {
            let lines = bytes.iter().filter(|byte| **byte == b'\n').count() + 2;
            // Form feeds and the like are line breaks to no one, carriage returns to YAML.
            let returns = bytes.iter().filter(|byte| **byte == b'\r').count();
            assert!(diagnostic.line as usize <= lines + returns, "{iteration}: {diagnostic:?}");
            assert!(!diagnostic.render().is_empty() && !diagnostic.message.is_empty());
        }
        sound += contents.len();
        broken += contents.broken.len();
    }
    assert!(sound > ITERATIONS / 16 && broken > ITERATIONS / 16, "the mutations are one-sided: {sound} {broken}");
}
