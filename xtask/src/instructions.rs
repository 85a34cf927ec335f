//! Instructions of what runs often, counted by valgrind and held against those that are recorded in the repository.
//!
//! Time on a shared machine says nothing about a change of a tenth; instructions are nearly the same in each run and on
//! each machine of one architecture, as long as the toolchain is (which is pinned) and no library chooses its code by the
//! processor.

use crate::process::{cargo, output, root, target};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A subject may take this much of what is recorded, in percent: room for what differs by chance (where reads of a
/// socket end, hash seeds) and between machines, not for work that was added to a loop.
const TOLERANCE_PERCENT: u64 = 125;

const RECORD: &str = "cargo xtask instructions --record";

/// The crates that are measured, and how they are built for it: as in a release, but for link-time optimisation. This
/// changes the development profile for them alone, so that every dependency is one that `cargo xtask test` has built
/// anyway (optimised, too); a profile of its own would build all of them again.
const MEASURED: [&str; 2] = ["mesh-common", "mesh-userspace"];
const SETTINGS: [&str; 5] =
    ["opt-level=3", "debug-assertions=false", "overflow-checks=false", "incremental=false", "codegen-units=16"];

/// Keeps glibc from copying with instructions whose count depends on the processor: a string instruction counts once
/// for each turn.
const TUNABLES: &str = "glibc.cpu.hwcaps=-ERMS,-FSRM";

/// Counts, by subject.
type Counts = BTreeMap<String, u64>;

/// What is wrong with a subject or a record.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    More { subject: String, recorded: u64, seen: u64 },
    Unrecorded { subject: String, seen: u64 },
    Gone { subject: String },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::More { subject, recorded, seen } => {
                let percent = u128::from(*seen) * 100 / u128::from((*recorded).max(1));
                write!(f, "{subject} takes {seen} instructions, {percent}% of the recorded {recorded}")
            }
            Self::Unrecorded { subject, seen } => write!(f, "{subject} takes {seen} instructions and has no record"),
            Self::Gone { subject } => write!(f, "{subject} is recorded and not measured any more"),
        }
    }
}

/// What the record does not allow.
fn compare(recorded: &Counts, seen: &Counts) -> Vec<Verdict> {
    let too_much = seen.iter().filter_map(|(subject, &seen)| {
        let subject = subject.clone();
        match recorded.get(&subject) {
            None => Some(Verdict::Unrecorded { subject, seen }),
            Some(&recorded) => {
                let is_more = u128::from(seen) * 100 > u128::from(recorded) * u128::from(TOLERANCE_PERCENT);
                is_more.then_some(Verdict::More { subject, recorded, seen })
            }
        }
    });
    let gone = recorded.keys().filter(|subject| !seen.contains_key(*subject));
    too_much.chain(gone.map(|subject| Verdict::Gone { subject: subject.clone() })).collect()
}

/// Counts, and fails where the record does not allow it.
pub(crate) fn check() -> Result<()> {
    let path = record_path();
    let text = fs::read_to_string(&path).with_context(|| {
        format!("there is no record of this architecture at {}: make it with `{RECORD}`", path.display())
    })?;
    let recorded = parse(&text).with_context(|| format!("cannot understand {}", path.display()))?;
    let seen = count()?;
    print(&seen, &recorded);
    let verdicts = compare(&recorded, &seen);
    if verdicts.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = verdicts.iter().map(ToString::to_string).collect();
    bail!(
        "instructions are not as recorded in {} (at most {TOLERANCE_PERCENT}% of it):\n  {}\nif that is meant, record \
         them anew with `{RECORD}` and say why in the commit",
        path.strip_prefix(root()).unwrap_or(&path).display(),
        lines.join("\n  ")
    )
}

/// Counts, and records.
pub(crate) fn record() -> Result<()> {
    let seen = count()?;
    print(&seen, &Counts::new());
    let path = record_path();
    fs::write(&path, render(&seen)).with_context(|| format!("cannot write {}", path.display()))
}

fn record_path() -> PathBuf {
    root().join("mesh-userspace/benches/instructions").join(format!("{}.toml", std::env::consts::ARCH))
}

fn print(seen: &Counts, recorded: &Counts) {
    for (subject, count) in seen {
        let known = recorded.get(subject).map_or_else(String::new, |known| format!(" (recorded: {known})"));
        eprintln!("{subject:<40} {count:>10} instructions{known}");
    }
}

fn render(counts: &Counts) -> String {
    let lines: String = counts.iter().map(|(subject, count)| format!("\"{subject}\" = {count}\n")).collect();
    format!("# Instructions of one run of each subject in `subjects/`, as `{RECORD}` has counted them.\n{lines}")
}

/// Reads what [`render`] has written.
fn parse(text: &str) -> Result<Counts> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut counts = Counts::new();
    for line in lines {
        let (subject, count) = line.split_once(" = ").with_context(|| format!("no `\"subject\" = count`: {line}"))?;
        let subject = subject.trim_matches('"').to_owned();
        let count = count.parse().with_context(|| format!("no number: {line}"))?;
        if counts.insert(subject.clone(), count).is_some() {
            bail!("{subject} is recorded twice");
        }
    }
    Ok(counts)
}

/// Builds the subjects and runs them in valgrind.
fn count() -> Result<Counts> {
    let mut build = cargo();
    // The same selection of packages as in the steps of `test`: another one has other features and builds all again.
    build.args(["build", "--quiet", "--workspace", "--exclude", "mesh-ebpf", "--example", "instructions"]);
    for package in MEASURED {
        build.args(
            SETTINGS
                .iter()
                .flat_map(|setting| ["--config".to_owned(), format!("profile.dev.package.{package}.{setting}")]),
        );
    }
    crate::process::run(&mut build)?;
    let folder = target().join("instructions");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let dumps = folder.join("dump");
    let names = output(
        Command::new("valgrind")
            .env("GLIBC_TUNABLES", TUNABLES)
            .args(["--tool=callgrind", "--quiet"])
            .arg(format!("--callgrind-out-file={}", dumps.display()))
            .args(["--toggle-collect=*instructions::measured*", "--dump-after=*instructions::written_down*"])
            .arg(target().join("debug/examples/instructions")),
    )?;
    names.lines().zip(1..).map(|(name, number)| Ok((name.to_owned(), total(&dumps, number)?))).collect()
}

/// The total of one dump.
fn total(dumps: &Path, number: usize) -> Result<u64> {
    let path = dumps.with_extension(number.to_string());
    let text = fs::read_to_string(&path).with_context(|| format!("valgrind has not written {}", path.display()))?;
    let total = totals(&text).with_context(|| format!("there is no total in {}", path.display()))?;
    if total == 0 {
        bail!("valgrind has counted nothing in {}: does it still know the measured function?", path.display());
    }
    Ok(total)
}

fn totals(dump: &str) -> Option<u64> {
    dump.lines().find_map(|line| line.strip_prefix("totals: "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pairs: &[(&str, u64)]) -> Counts {
        pairs.iter().map(|(subject, count)| ((*subject).to_owned(), *count)).collect()
    }

    #[test]
    fn a_quarter_more_than_recorded_is_allowed_and_one_instruction_more_is_not() {
        let recorded = counts(&[("pick", 1_000)]);
        for fine in [1, 1_000, 1_250] {
            assert_eq!(compare(&recorded, &counts(&[("pick", fine)])), [], "{fine}");
        }
        let verdicts = compare(&recorded, &counts(&[("pick", 1_251)]));
        assert_eq!(verdicts, [Verdict::More { subject: "pick".into(), recorded: 1_000, seen: 1_251 }]);
        let message = verdicts[0].to_string();
        assert!(message.contains("pick") && message.contains("1251") && message.contains("1000"), "{message}");
    }

    #[test]
    fn a_subject_without_a_record_and_a_record_without_a_subject_are_found() {
        let verdicts = compare(&counts(&[("old", 1), ("same", 2)]), &counts(&[("new", 3), ("same", 2)]));
        let expected =
            [Verdict::Unrecorded { subject: "new".into(), seen: 3 }, Verdict::Gone { subject: "old".into() }];
        assert_eq!(verdicts, expected);
    }

    #[test]
    fn counts_near_the_largest_number_are_compared_without_overflow() {
        let most = counts(&[("all", u64::MAX)]);
        assert_eq!(compare(&most, &most), []);
        assert_eq!(compare(&counts(&[("all", u64::MAX / 2)]), &most).len(), 1);
    }

    #[test]
    fn what_is_recorded_is_read_back_and_what_is_garbled_is_refused() {
        let known = counts(&[("pick/Random/10_endpoints", 129_032), ("relay", 7)]);
        assert_eq!(parse(&render(&known)).expect("it reads what it wrote"), known);
        for garbled in ["\"pick\" 7", "\"pick\" = many", "\"pick\" = 1\n\"pick\" = 2"] {
            assert!(parse(garbled).is_err(), "{garbled}");
        }
    }

    #[test]
    fn the_total_of_a_dump_is_read() {
        let dump = "# callgrind format\nversion: 1\nevents: Ir\nsummary: 12\n\nfn=(1) x\n1 12\n\ntotals: 12\n";
        assert_eq!(totals(dump), Some(12));
        assert_eq!(totals("# callgrind format\n"), None);
    }
}
