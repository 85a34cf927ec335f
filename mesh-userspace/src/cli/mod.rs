//! `nodemesh`, the operator's command: asks the daemon over its local socket and prints the answer, or checks a catalog
//! without a daemon. Data goes to standard output, everything else to standard error.

mod authority;
mod cert;
mod endpoints;
mod fetch;
mod policy;
mod show;
mod table;
mod traffic;
mod validate;

use crate::admin::documents::{
    ConnectionRow, DEFAULT_SOCKET, DiagnosticRow, Document, Item, LaneRow, ServiceRow, Status, VersionRow, WorkloadRow,
};
use crate::admin::endpoints::EndpointRow;
use crate::admin::policies::{PlaintextRow, PolicyRow};
use crate::admin::traffic::TrafficRow;
use authority::{CaVerb, JoinArguments, NodeVerb};
use clap::{Args, Parser, Subcommand, ValueEnum};
use fetch::{Daemon, FetchError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use show::Show;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// How the command ends. Documented in docs/CLI.md; scripts rely on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Ok = 0,
    /// It could not be done.
    Failure = 1,
    /// The command line is wrong (clap's own code).
    Usage = 2,
    /// It was done, and something was found.
    Findings = 3,
    /// The daemon does not answer.
    Unreachable = 4,
    /// Rows were printed, and there are more.
    Partial = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Look into nodemesh, the service mesh without sidecars
#[derive(Debug, Parser)]
#[command(
    name = "nodemesh",
    version,
    about,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 something was found, 4 the daemon does not answer, \
                  5 part of the answer only"
)]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
struct Options {
    /// The daemon's admin socket
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Leave the header lines of tables out
    #[arg(long, global = true)]
    no_headers: bool,
    /// How long to wait for the daemon, in seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    /// A table with more columns
    Wide,
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show this node's state: version, configuration, workloads, connections, certificates, kernel counters
    Status,
    /// List what the daemon knows
    #[command(subcommand)]
    Get(Resource),
    /// Look at this node's certificates and roots, and renew certificates
    #[command(subcommand)]
    Cert(cert::Verb),
    /// Say what would happen to a connection: where it goes, how it arrives, which rule decides. Exit code 3: refused
    Explain {
        /// Who calls: NAMESPACE/WORKLOAD, an IP address or a SPIFFE ID
        #[arg(value_name = "SRC")]
        source: String,
        /// What is called: NAMESPACE/SERVICE, NAMESPACE/WORKLOAD or an IP address
        #[arg(value_name = "DST[:PORT]")]
        destination: String,
    },
    /// Check a catalog directory; needs neither a daemon nor privileges
    Validate {
        /// The directory with the catalog's YAML files
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// The least severity that makes the exit code 3
        #[arg(long, value_enum, default_value_t = Threshold::Error)]
        failure_threshold: Threshold,
    },
    /// Nodes and the tokens with which they join
    #[command(subcommand)]
    Node(NodeVerb),
    /// Let this node join: get its certificate with a token; needs no daemon here
    Join(JoinArguments),
    /// The certificate authority
    #[command(subcommand)]
    Ca(CaVerb),
    /// Show the version of this command and of the daemon, if one answers
    Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Threshold {
    Error,
    Warning,
}

#[derive(Debug, Subcommand)]
enum Resource {
    /// Workloads of the whole catalog, and how far capture is on this node
    #[command(visible_aliases = ["workload", "wl"])]
    Workloads,
    /// Services and their endpoints
    #[command(visible_aliases = ["service", "svc"])]
    Services,
    /// Connections that are open now on this node
    #[command(visible_aliases = ["connection", "conn"])]
    Connections {
        /// Show the newest N only
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        limit: Option<u32>,
    },
    /// Connections between this node and others
    #[command(visible_alias = "lane")]
    Lanes,
    /// Endpoints of services that this node's connections have asked for, and how they fare
    #[command(visible_aliases = ["endpoint", "ep"])]
    Endpoints,
    /// What is wrong with the catalog that the daemon reads
    #[command(visible_aliases = ["diagnostic", "diag"])]
    Diagnostics,
    /// Authorization policies, whom they are for, and how often they decided on this node
    #[command(visible_aliases = ["policy", "pol"])]
    Policies,
    /// How services spread their connections, and what is done when those fail
    #[command(visible_alias = "tp")]
    Traffic,
    /// Who called workloads of this node in plaintext: what still keeps them from STRICT
    Plaintext,
}

/// Connections asked for where the command line names no number.
const CONNECTIONS: u32 = 10_000;

impl Command {
    /// Carries the command out, prints to standard output and error, and says how to exit.
    #[must_use]
    pub fn execute(&self) -> Exit {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let mut err = io::stderr();
        self.execute_with(&mut out, &mut err, SystemTime::now())
    }

    fn execute_with(&self, out: &mut impl Write, err: &mut impl Write, now: SystemTime) -> Exit {
        let mut session = Session { options: &self.options, out, now };
        let done = session.perform(&self.verb).and_then(|exit| Ok(session.out.flush().map(|()| exit)?));
        match done {
            Ok(Done { exit, note }) => {
                note.map_or(exit, |note| writeln!(err, "note: {note}").map_or(Exit::Failure, |()| exit))
            }
            // Whoever reads our output has seen enough (`nodemesh get wl | head -1`).
            Err(Problem::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Exit::Ok,
            Err(problem) => {
                // If even standard error is gone, the exit code still says it.
                let _ = write!(err, "{problem}");
                problem.exit()
            }
        }
    }
}

/// A command that came to its end.
struct Done {
    exit: Exit,
    /// For standard error.
    note: Option<String>,
}

impl From<Exit> for Done {
    fn from(exit: Exit) -> Self {
        Self { exit, note: None }
    }
}

/// Why a command stopped.
enum Problem {
    Fetch(FetchError),
    /// The certificate authority does not answer.
    Authority(String),
    Input(String),
    Output(io::Error),
}

impl Problem {
    fn exit(&self) -> Exit {
        match self {
            Self::Fetch(error) if error.is_unreachable() => Exit::Unreachable,
            Self::Authority(_) => Exit::Unreachable,
            Self::Fetch(_) | Self::Input(_) | Self::Output(_) => Exit::Failure,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fetch(error) => {
                writeln!(f, "error: {error}")?;
                error.help().map_or(Ok(()), |help| writeln!(f, "help: {help}"))
            }
            Self::Authority(message) => {
                writeln!(f, "error: {message}")?;
                writeln!(
                    f,
                    "help: name the address and port of the certificate authority (`listen`), and see that it runs"
                )
            }
            Self::Input(message) => writeln!(f, "error: {message}"),
            Self::Output(error) => writeln!(f, "error: cannot write the output: {error}"),
        }
    }
}

impl From<FetchError> for Problem {
    fn from(error: FetchError) -> Self {
        Self::Fetch(error)
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

struct Session<'a, W> {
    options: &'a Options,
    out: &'a mut W,
    now: SystemTime,
}

impl<W: Write> Session<'_, W> {
    fn perform(&mut self, verb: &Verb) -> Result<Done, Problem> {
        match verb {
            Verb::Status => self.get::<Status>("/v1/status"),
            Verb::Get(Resource::Workloads) => self.get::<WorkloadRow>("/v1/workloads"),
            Verb::Get(Resource::Services) => self.get::<ServiceRow>("/v1/services"),
            Verb::Get(Resource::Lanes) => self.get::<LaneRow>("/v1/lanes"),
            Verb::Get(Resource::Endpoints) => self.get::<EndpointRow>("/v1/endpoints"),
            Verb::Get(Resource::Diagnostics) => self.get::<DiagnosticRow>("/v1/diagnostics"),
            Verb::Get(Resource::Policies) => self.get::<PolicyRow>("/v1/policies"),
            Verb::Get(Resource::Traffic) => self.get::<TrafficRow>("/v1/traffic"),
            Verb::Get(Resource::Plaintext) => self.get::<PlaintextRow>("/v1/plaintext"),
            Verb::Get(Resource::Connections { limit }) => self.connections(*limit),
            Verb::Cert(verb) => self.cert(verb),
            Verb::Explain { source, destination } => self.explain(source, destination),
            Verb::Validate { directory, failure_threshold } => self.validate(directory, *failure_threshold),
            Verb::Node(verb) => self.node(verb),
            Verb::Join(arguments) => self.join(arguments),
            Verb::Ca(verb) => self.authority(verb),
            Verb::Version => self.version(),
        }
    }

    fn fetch<T: Item + DeserializeOwned>(&self, path: &str) -> Result<Document<T>, FetchError> {
        Daemon::new(&self.options.socket, Duration::from_secs(self.options.timeout)).get(path)
    }

    fn get<T: Item + Show + Serialize + DeserializeOwned>(&mut self, path: &str) -> Result<Done, Problem> {
        let document = self.fetch::<T>(path)?;
        self.print(&document)?;
        Ok(Exit::Ok.into())
    }

    fn connections(&mut self, limit: Option<u32>) -> Result<Done, Problem> {
        let path = format!("/v1/connections?limit={}", limit.unwrap_or(CONNECTIONS));
        let document = self.fetch::<ConnectionRow>(&path)?;
        self.print(&document)?;
        let shown = document.items.len() as u64;
        let total = document.total.unwrap_or(shown);
        if total <= shown {
            return Ok(Exit::Ok.into());
        }
        let note = format!("{shown} of {total} connections are shown, the newest; --limit N shows more");
        // Who asked for so many, got so many.
        let asked_for = limit.is_some_and(|limit| u64::from(limit) == shown);
        Ok(Done { exit: if asked_for { Exit::Ok } else { Exit::Partial }, note: Some(note) })
    }

    fn version(&mut self) -> Result<Done, Problem> {
        let own = VersionRow {
            component: "nodemesh".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            abi: mesh_common::ABI_VERSION,
        };
        let mut rows = vec![own];
        // The question was for versions: no daemon is an answer, too.
        if let Ok(status) = self.fetch::<Status>("/v1/status") {
            let daemon = |status: Status| VersionRow {
                component: "nodemeshd".to_owned(),
                version: status.version,
                abi: status.abi,
            };
            rows.extend(status.items.into_iter().map(daemon));
        }
        self.print(&Document::new(rows))?;
        Ok(Exit::Ok.into())
    }

    fn validate(&mut self, directory: &std::path::Path, threshold: Threshold) -> Result<Done, Problem> {
        let found = validate::check(directory).map_err(Problem::Input)?;
        if self.options.output == Output::Json {
            self.print(&Document::new(found.rows()))?;
        } else {
            found.write(self.out)?;
        }
        let fails = found.errors() > 0 || threshold == Threshold::Warning && found.warnings() > 0;
        Ok(Done { exit: if fails { Exit::Findings } else { Exit::Ok }, note: None })
    }

    fn print<T: Show + Serialize>(&mut self, document: &Document<T>) -> Result<(), Problem> {
        if self.options.output == Output::Json {
            serde_json::to_writer_pretty(&mut *self.out, document).map_err(io::Error::from)?;
            writeln!(self.out)?;
            return Ok(());
        }
        let view =
            show::View { wide: self.options.output == Output::Wide, headers: !self.options.no_headers, now: self.now };
        self.out.write_all(T::show(&document.items, &view).as_bytes())?;
        Ok(())
    }
}

#[cfg(test)]
mod authority_tests;
#[cfg(test)]
mod fake_daemon;
#[cfg(test)]
mod tests;
