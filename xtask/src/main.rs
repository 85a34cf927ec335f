//! The only door to this repository: every verb first makes sure of what it needs and says what it installs.

mod ebpf;
mod instructions;
mod packages;
mod process;
mod setup;
mod testing;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask VERB

  setup          install what the other verbs need: rust-src, bpf-linker, cargo-deny, and the programs that the
                 testbed runs (nginx, redis, curl, promtool, valgrind; by apt, as root); idempotent
  build-ebpf     build the eBPF object into target/ebpf; --log: programs log every decision
  tidy           check the house rules, the formatting, licences and sources of dependencies
  test           everything: tidy, clippy, unit, property and doc tests, scenarios on the testbed (as root)
  demo           two nodes with real programs and a table of what happened between them (as root)
                 --once: check every expectation and end; --keep: stay up to be tried by hand
  bench          the mesh beside direct TCP, Envoy, HAProxy and nginx on the testbed (as root), with an optimised build;
                 --quick: a look; --help: planes and measures; `bench scale`: many services and workloads instead;
                 `bench micro`: time and instructions of what runs often, and the eBPF programs' time per run
  instructions   instructions of what runs often, held against the record, as `test` does; --record: records them anew
  soak           ten minutes of traffic under rotating certificates, the long form of a scenario of `test` (as root)
  clean-testbed  remove what killed tests and demos left behind
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (verb, rest) = arguments.split_first().map_or(("help", &[][..]), |(verb, rest)| (verb.as_str(), rest));
    let outcome = match verb {
        "setup" => setup::everything(),
        "build-ebpf" => ebpf::build(rest.iter().any(|argument| argument == "--log")),
        "tidy" => tidy::check(),
        "test" => testing::test(),
        "demo" => testing::demo(rest),
        "bench" => testing::bench(rest),
        "instructions" => testing::instructions(rest),
        "soak" => testing::soak(),
        "clean-testbed" => testing::clean_testbed(),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        unknown => {
            eprintln!("xtask: there is no verb {unknown:?}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {verb}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
