//! The parser against bytes that nobody meant: mutations of the committed seeds, always the same ones.

use super::super::{Severity, parse_documents};
use std::path::Path;

const ITERATIONS: usize = 5_000;

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

#[test]
fn no_bytes_make_the_parser_panic_or_lose_its_place() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/catalog");
    let mut paths: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<_> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(seeds.len() >= 6, "seeds are missing from {}", corpus.display());

    let mut random = Random(0x6e6f_6465_6d65_7368);
    let (mut sound, mut broken) = (0, 0);
    for iteration in 0..ITERATIONS {
        let bytes = mutate(&seeds, &mut random);
        let contents = parse_documents("fuzz.yaml", &bytes);
        let errors = contents.diagnostics().iter().filter(|d| d.severity == Severity::Error).count();
        assert_eq!(errors > 0, !contents.broken.is_empty(), "{iteration}: {:?}", String::from_utf8_lossy(&bytes));
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
