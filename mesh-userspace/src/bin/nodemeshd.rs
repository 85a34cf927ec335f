//! The node daemon: parse, run, exit code.

use clap::Parser;
use mesh_userspace::app::Command;
use std::process::ExitCode;

fn main() -> ExitCode {
    match Command::parse().execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nodemeshd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
