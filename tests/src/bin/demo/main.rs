//! The demonstration: two nodes, real programs, real traffic, and one table of what happened to it.
//!
//! Everything in the table was seen from outside: by the clients, by the servers, by a wiretap on the link between the
//! nodes, and in what the daemons log and count.

mod clients;
mod outcome;
mod refused;
mod scene;
mod table;

use anyhow::{Context, Result};
use clap::Parser;
use mesh_tests::sweep::{sweep, sweep_own};
use outcome::Outcome;
use scene::Scene;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Instant;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo", about)]
struct Arguments {
    /// Check every expectation and end, with exit code 1 if one was not met; this is what happens without options, too.
    #[arg(long, conflicts_with = "keep")]
    once: bool,
    /// Stay up after the table, to try things by hand.
    #[arg(long)]
    keep: bool,
    /// How streams travel between the nodes: `auto`, `lanes` or `quic`.
    #[arg(long, default_value = "auto", value_parser = ["auto", "lanes", "quic"])]
    transport: String,
}

enum Event {
    Interrupted,
    Finished(Result<bool>),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (sender, events) = mpsc::channel();
    let finished = sender.clone();
    // Everything the demo makes belongs to this thread's values; an interrupt cleans up from outside.
    std::thread::spawn(move || finished.send(Event::Finished(run(&arguments))));
    std::thread::spawn(move || {
        if wait_for_interrupt().is_ok() {
            let _ = sender.send(Event::Interrupted);
        }
    });
    match events.recv() {
        Ok(Event::Finished(Ok(true))) => ExitCode::SUCCESS,
        Ok(Event::Finished(Ok(false))) => ExitCode::FAILURE,
        Ok(Event::Finished(Err(error))) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
        Ok(Event::Interrupted) | Err(_) => {
            eprintln!("\ndemo: removing everything that was made");
            if let Err(error) = sweep_own() {
                eprintln!("demo: {error:#}; `cargo xtask clean-testbed` removes the rest");
            }
            ExitCode::from(130)
        }
    }
}

fn wait_for_interrupt() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupt = tokio::signal::ctrl_c() => Ok(interrupt?),
        }
    })
}

fn progress(text: &str) {
    eprintln!("demo: {text}");
}

/// Runs the demo; `true` if every expectation was met.
fn run(arguments: &Arguments) -> Result<bool> {
    let started = Instant::now();
    sweep().context("cannot remove what earlier demos left behind")?;
    progress("making two nodes and their pods; an authority, two joins by token, a nodemeshd on each node");
    let scene = Scene::set(&arguments.transport)?;
    progress("sending traffic while a wiretap watches the link between the nodes");
    let outcome = Outcome::of(&scene)?;
    print!("{}", table::render(&outcome));
    let expectations = outcome.expectations();
    print!("{}", table::render_expectations(&expectations));
    let met = expectations.iter().all(|expectation| expectation.met);
    println!("The demo took {:.1} s.", started.elapsed().as_secs_f64());
    if !met {
        for daemon in scene.cluster.daemons() {
            eprintln!("---- the log of {} ends with ----\n{}", daemon.node(), daemon.log_end());
        }
    }
    if arguments.keep {
        print!("{}", scene.instructions());
        // Ends by an interrupt, which the main thread receives.
        loop {
            std::thread::park();
        }
    }
    Ok(met)
}
