//! `nodemeshd`'s command line.

use super::App;
use super::cleanup::cleanup;
use crate::ca;
use crate::config::{CaConfig, Config, duration};
use crate::model::{ObjectName, TrustDomain};
use crate::runtime::Cores;
use crate::{netns, telemetry};
use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Threads for everything but traffic.
const CONTROL_THREADS: usize = 2;

/// The nodemesh node daemon.
#[derive(Parser)]
#[command(name = "nodemeshd", version, about)]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the daemon in the foreground until SIGTERM or SIGINT
    Run(ConfigFile),
    /// Check a configuration file and exit
    CheckConfig(ConfigFile),
    /// Remove what a killed daemon with this configuration left in the kernel; idempotent
    Cleanup(ConfigFile),
    /// The embedded certificate authority
    #[command(subcommand)]
    Ca(CaVerb),
}

#[derive(Args)]
struct ConfigFile {
    /// The daemon's configuration (YAML)
    #[arg(short, long, value_name = "FILE", default_value = "/etc/nodemesh/nodemeshd.yaml")]
    config: PathBuf,
}

#[derive(Subcommand)]
enum CaVerb {
    /// Run the certificate authority until SIGTERM or SIGINT: nodes join, renew, and ask for their workloads' identities
    Run {
        /// The authority's configuration (YAML)
        #[arg(short, long, value_name = "FILE", default_value = "/etc/nodemesh/ca.yaml")]
        config: PathBuf,
    },
    /// Create a certificate authority: a folder (mode 0700) with its keys and its memory
    Init {
        /// Folder to create it in; must not hold one yet
        #[arg(long)]
        dir: PathBuf,
        /// Trust domain of every identity it will issue, e.g. example.org
        #[arg(long)]
        trust_domain: String,
    },
    /// Issue a workload identity into a node's identity folder
    Issue {
        /// Folder of the certificate authority
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        namespace: String,
        #[arg(long)]
        service_account: String,
        /// Identity folder of a node (`identity.directory` of its configuration)
        #[arg(long)]
        out: PathBuf,
        /// Lifetime: a whole number and ms, s, m or h
        #[arg(long, default_value = "12h")]
        ttl: String,
    },
}

impl Command {
    /// Carries the command out.
    ///
    /// # Errors
    /// Says what could not be done and why.
    pub fn execute(self) -> Result<()> {
        match self.verb {
            Verb::Run(file) => {
                let config = Config::load(&file.config)?;
                telemetry::logging::init(&config.log.filter, config.log.format)?;
                let runtime =
                    tokio::runtime::Builder::new_multi_thread().worker_threads(CONTROL_THREADS).enable_all().build()?;
                let (cores, _threads) = Cores::start(config.threads, config.polling, netns::enter_from_this_thread)
                    .context("cannot start the threads that carry traffic")?;
                runtime.block_on(async { App::bind(config, cores).await?.run().await })
            }
            Verb::CheckConfig(file) => {
                Config::load(&file.config)?;
                println!("{}: ok", file.config.display());
                Ok(())
            }
            Verb::Cleanup(file) => {
                let config = Config::load(&file.config)?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(cleanup(&config))
            }
            Verb::Ca(verb) => verb.execute(),
        }
    }
}

impl CaVerb {
    fn execute(self) -> Result<()> {
        match self {
            Self::Run { config } => {
                let config = CaConfig::load(&config)?;
                telemetry::logging::init(&config.log.filter, config.log.format)?;
                let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
                runtime.block_on(super::ca::run(config))?;
            }
            Self::Init { dir, trust_domain } => {
                ca::init(&dir, &TrustDomain::parse(&trust_domain)?)?;
                println!("created a certificate authority for {trust_domain} in {}", dir.display());
            }
            Self::Issue { dir, namespace, service_account, out, ttl } => {
                let account = ObjectName::parse(&namespace, &service_account)?;
                let issued = ca::issue(&dir, &account, duration(&ttl).context("--ttl")?, &out)?;
                println!("issued {} into {}", issued.id, out.display());
            }
        }
        Ok(())
    }
}
