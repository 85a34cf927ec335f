//! The benchmarks' HTTP/1.1 client: one thread and epoll, so that it costs little beside what it measures. Prints one
//! JSON document.

mod closed;
mod connection;
mod fresh;
mod held;
mod measure;
mod paced;

use anyhow::Result;
use clap::{Args, Parser};
use mesh_tests::report::Requests;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Debug, Parser)]
#[command(about)]
enum Load {
    /// Keep connections open; each sends its next request when the last one is answered.
    Closed(Options),
    /// Keep connections open; requests are due at a steady rate, and their time counts from when they were due.
    Paced {
        #[command(flatten)]
        options: Options,
        /// Requests a second.
        #[arg(long)]
        rate: u32,
    },
    /// A connection a request; as many at a time as there are connections.
    Fresh(Options),
    /// Open connections, one request each, say `holding` on stderr, and keep them until the end of input.
    Held(Options),
}

#[derive(Debug, Args)]
struct Options {
    destination: SocketAddr,
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// How long, once all connections are open and have been answered once.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// End after this many requests even if time is left.
    #[arg(long)]
    requests: Option<u64>,
}

impl Options {
    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn is_enough(&self, requests: u64) -> bool {
        self.requests.is_some_and(|limit| requests >= limit)
    }
}

fn main() -> ExitCode {
    match run(&Load::parse()) {
        Ok(requests) => {
            println!("{}", serde_json::to_string(&requests).expect("a report is plain data"));
            if requests.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("mesh-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(load: &Load) -> Result<Requests> {
    match load {
        Load::Closed(options) => closed::run(options),
        Load::Paced { options, rate } => paced::run(options, *rate),
        Load::Fresh(options) => fresh::run(options),
        Load::Held(options) => held::run(options),
    }
}
