//! The test mesh's certificate authority: `nodemeshd ca`, as an operator uses it.

use crate::program::binary;
use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A certificate authority in a folder, and the identities that it has issued into another.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    trust_domain: String,
}

impl Authority {
    /// Makes a new root.
    ///
    /// # Errors
    /// If `nodemeshd ca init` fails.
    pub fn create(folder: &Path, trust_domain: &str) -> Result<Self> {
        run(["ca", "init", "--dir"]
            .map(OsStr::new)
            .into_iter()
            .chain([folder.as_os_str()])
            .chain(["--trust-domain", trust_domain].map(OsStr::new)))?;
        Ok(Self { folder: folder.to_owned(), trust_domain: trust_domain.to_owned() })
    }

    /// Issues the certificate of a service account into an identity directory, for the default time.
    ///
    /// # Errors
    /// If `nodemeshd ca issue` fails.
    pub fn issue(&self, namespace: &str, account: &str, identities: &Path) -> Result<()> {
        self.issue_for(namespace, account, identities, "12h")
    }

    /// [`Self::issue`] with a life time as the command line takes it (`90s`, `12h`).
    ///
    /// # Errors
    /// If `nodemeshd ca issue` fails.
    pub fn issue_for(&self, namespace: &str, account: &str, identities: &Path, ttl: &str) -> Result<()> {
        let arguments = ["ca", "issue", "--namespace", namespace, "--service-account", account, "--ttl", ttl];
        let folders = [OsStr::new("--dir"), self.folder.as_os_str(), OsStr::new("--out"), identities.as_os_str()];
        run(arguments.map(OsStr::new).into_iter().chain(folders))
    }

    /// The SPIFFE ID of a service account.
    #[must_use]
    pub fn spiffe_id(&self, namespace: &str, account: &str) -> String {
        format!("spiffe://{}/ns/{namespace}/sa/{account}", self.trust_domain)
    }

    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }
}

fn run<'a>(arguments: impl Iterator<Item = &'a OsStr>) -> Result<()> {
    let mut command = Command::new(binary("nodemeshd"));
    command.args(arguments);
    let output = command.output().context("cannot start nodemeshd")?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
