//! The operator's command; everything it does is in `mesh_userspace::cli`.

use clap::Parser;
use mesh_userspace::cli::Command;
use std::process::ExitCode;

fn main() -> ExitCode {
    Command::parse().execute().into()
}
