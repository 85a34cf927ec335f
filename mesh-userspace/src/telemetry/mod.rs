//! What the daemon tells about itself: metric families, the table of open connections, access log, logging.
//! A leaf: it imports no other room, and what it shows of them arrives as plain values and closures.

mod access_line;
pub mod access_log;
pub mod balance;
mod bounded;
pub mod bounds;
pub mod ca;
pub mod catalog;
pub mod certificates;
pub mod connections;
pub mod datagrams;
pub mod datapath;
pub mod dns;
mod exposition;
pub mod flows;
mod limit;
pub mod live;
mod log_lines;
pub mod logging;
pub mod plaintext;
pub mod policy;
pub mod polling;
mod process;
pub mod tunnel;

pub use exposition::Format;

use bounds::AcceptFailures;
use connections::{ConnectionMetrics, Limits};
use policy::PolicyMetrics;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// What this program was built from.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    pub version: &'static str,
    /// Of the kernel/user contract.
    pub abi: u32,
}

/// The TLS that this daemon offers.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Key exchange groups, the preferred one first, separated by commas.
    pub kx: String,
    /// Cipher suites, likewise.
    pub suite: String,
    /// The library behind them.
    pub provider: String,
    pub fips: bool,
}

/// Every metric of the daemon. Components register at start; then it is shared and only read.
#[derive(Debug)]
pub struct Metrics {
    /// `nodemesh_*`.
    mesh: Registry,
    /// `process_*`: names that every tool knows, hence without our prefix.
    process: Registry,
    connections: ConnectionMetrics,
    policy: PolicyMetrics,
    accepts: AcceptFailures,
}

impl Metrics {
    #[must_use]
    pub fn new(build: Build) -> Self {
        let mut mesh = Registry::with_prefix("nodemesh");
        let labels = vec![("version", build.version.to_owned()), ("abi", build.abi.to_string())];
        mesh.register("build", "What this daemon was built from", Info::new(labels));
        let policy = PolicyMetrics::register(&mut mesh);
        let connections = ConnectionMetrics::register_with(&mut mesh, Limits::default(), policy.bounded());
        let accepts = AcceptFailures::register(&mut mesh);
        let mut process = Registry::default();
        process.register_collector(Box::new(process::Collector::new()));
        Self { mesh, process, connections, policy, accepts }
    }

    /// Where components register their families, without the prefix `nodemesh_`.
    pub fn registry(&mut self) -> &mut Registry {
        &mut self.mesh
    }

    /// Adds `nodemesh_tls_info`.
    pub fn tls(&mut self, tls: Tls) {
        let labels =
            vec![("kx", tls.kx), ("suite", tls.suite), ("provider", tls.provider), ("fips", tls.fips.to_string())];
        self.mesh.register("tls", "The TLS that this daemon offers", Info::new(labels));
    }

    #[must_use]
    pub fn connections(&self) -> &ConnectionMetrics {
        &self.connections
    }

    /// What listeners could not accept.
    #[must_use]
    pub fn accepts(&self) -> &AcceptFailures {
        &self.accepts
    }

    #[must_use]
    pub fn policy(&self) -> &PolicyMetrics {
        &self.policy
    }

    /// Every metric as text, in the format that the `Accept` header asks for, and its content type.
    #[must_use]
    pub fn encode(&self, accept: Option<&str>) -> (&'static str, String) {
        let format = Format::negotiate(accept);
        (format.content_type(), exposition::encode(format, &[&self.mesh, &self.process]))
    }
}

#[cfg(test)]
mod reference_tests;
#[cfg(test)]
mod tests;
