//! The settings of a certificate authority: a process of its own (`ca.yaml`), or a section of the daemon's.

use super::{Log, RawAdmin, RawDirectory, RawLog, duration};
use crate::ca::{DEFAULT_NODE_TTL, DEFAULT_PORT, DEFAULT_TTL, Lives, MAX_TTL};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// An authority and its port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    pub directory: PathBuf,
    pub listen: Vec<SocketAddr>,
    pub lives: Lives,
}

impl Authority {
    /// Where a process on this machine reaches it.
    #[must_use]
    pub fn local_addresses(&self) -> Vec<String> {
        let local = |address: &SocketAddr| match address.ip() {
            ip if !ip.is_unspecified() => *address,
            IpAddr::V4(_) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port()),
            IpAddr::V6(_) => SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), address.port()),
        };
        self.listen.iter().map(|address| local(address).to_string()).collect()
    }
}

/// Everything `nodemeshd ca run` needs, valid.
#[derive(Clone, Debug)]
pub struct CaConfig {
    pub authority: Authority,
    pub catalog: PathBuf,
    pub admin: crate::admin::Config,
    pub log: Log,
}

/// The section `ca` of the daemon's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawAuthority {
    directory: PathBuf,
    #[serde(default = "default_listen")]
    listen: Vec<SocketAddr>,
    ttl: Option<String>,
    node_ttl: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawCaConfig {
    directory: PathBuf,
    catalog: RawDirectory,
    #[serde(default = "default_listen")]
    listen: Vec<SocketAddr>,
    #[serde(default)]
    certificates: RawLives,
    #[serde(default)]
    admin: RawAdmin,
    #[serde(default)]
    log: RawLog,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawLives {
    ttl: Option<String>,
    node_ttl: Option<String>,
}

fn default_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), DEFAULT_PORT)]
}

impl RawAuthority {
    pub(super) fn checked(self) -> Result<Authority> {
        let lives = RawLives { ttl: self.ttl, node_ttl: self.node_ttl }.checked("ca")?;
        checked_listen(&self.listen, "ca.listen")?;
        Ok(Authority { directory: self.directory, listen: self.listen, lives })
    }
}

impl RawLives {
    fn checked(self, section: &str) -> Result<Lives> {
        let life = |text: Option<String>, default: Duration, field: &str| {
            let life =
                text.map_or(Ok(default), |text| duration(&text)).with_context(|| format!("{section}.{field}"))?;
            let days = MAX_TTL.as_secs() / (24 * 60 * 60);
            let sound = life >= Duration::from_secs(1) && life <= MAX_TTL;
            ensure!(sound, "{section}.{field}: from 1s to {days} days ({}h)", days * 24);
            Ok(life)
        };
        Ok(Lives {
            workload: life(self.ttl, DEFAULT_TTL, "ttl")?,
            node: life(self.node_ttl, DEFAULT_NODE_TTL, "nodeTtl")?,
        })
    }
}

fn checked_listen(listen: &[SocketAddr], field: &str) -> Result<()> {
    ensure!(!listen.is_empty(), "{field}: name at least one address, e.g. ['10.0.0.1:{DEFAULT_PORT}']");
    Ok(())
}

impl CaConfig {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// Says which file, line and field is wrong, and what would be right.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let raw: RawCaConfig = serde_saphyr::from_str(text)?;
        checked_listen(&raw.listen, "listen")?;
        Ok(Self {
            authority: Authority {
                directory: raw.directory,
                listen: raw.listen,
                lives: raw.certificates.checked("certificates")?,
            },
            catalog: raw.catalog.directory,
            admin: crate::admin::Config { socket: raw.admin.socket, listen: raw.admin.listen },
            log: raw.log.checked()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "directory: /var/lib/nodemesh/ca\ncatalog: {directory: /etc/nodemesh/conf.d}\n";

    #[test]
    fn the_smallest_file_gets_sound_defaults() {
        let config = CaConfig::parse(SMALLEST).unwrap();
        assert_eq!(config.authority.listen, ["0.0.0.0:9416".parse().unwrap()]);
        assert_eq!(config.authority.local_addresses(), ["127.0.0.1:9416"]);
        assert_eq!(config.authority.lives, Lives { workload: DEFAULT_TTL, node: DEFAULT_NODE_TTL });
        let config = CaConfig::parse(&format!("{SMALLEST}certificates: {{ttl: 20s, nodeTtl: 1h}}\n")).unwrap();
        assert_eq!(config.authority.lives.workload, Duration::from_secs(20));
    }

    #[test]
    fn unusable_values_are_refused_with_the_field() {
        for (more, field) in [
            ("listen: []", "listen"),
            ("certificates: {ttl: 100ms}", "certificates.ttl"),
            ("certificates: {nodeTtl: 10000h}", "certificates.nodeTtl"),
            ("certificate: {}", "certificate"),
        ] {
            let error = format!("{:#}", CaConfig::parse(&format!("{SMALLEST}{more}\n")).unwrap_err());
            assert!(error.contains(field), "{error}");
        }
    }
}
