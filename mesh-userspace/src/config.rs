//! The daemon's settings: a YAML file becomes a checked [`Config`], and nothing else reads files, arguments or the
//! environment for settings.

mod ca;

pub use ca::{Authority, CaConfig};

use crate::model::NodeName;
use crate::netns;
use crate::telemetry::logging::{Filter, Format};
use crate::tunnel::Congestion;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything `nodemeshd run` needs, valid.
#[derive(Clone, Debug)]
pub struct Config {
    pub node: NodeName,
    pub catalog: PathBuf,
    pub identity: Identity,
    pub tunnel: crate::tunnel::Config,
    /// Port of every node's tunnel: the one this node listens on.
    pub tunnel_port: u16,
    pub datapath: crate::datapath::Config,
    pub admin: crate::admin::Config,
    pub log: Log,
    /// Connections of applications that may be carried at once, both directions together.
    pub connections: usize,
    /// Threads that carry traffic; `None`: one for each processor that the process may use.
    pub threads: Option<NonZeroUsize>,
    /// The share of one processor that these threads may take for waiting awake.
    pub polling: f64,
    /// How long SIGTERM waits for connections to end by themselves.
    pub drain: Duration,
    /// The certificate authority that runs inside this daemon, if one does.
    pub ca: Option<Authority>,
}

/// Where the certificates of this node's workloads come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Files in a directory, written by someone else.
    Files { directory: PathBuf },
    /// A certificate authority, which this node has joined: the directory holds its own certificate and the roots.
    Authority { directory: PathBuf, addresses: Vec<String> },
}

impl Identity {
    /// Where the node keeps what is its own: the bundle, its certificate, and those of workloads if they are in files.
    #[must_use]
    pub fn directory(&self) -> &Path {
        match self {
            Self::Files { directory } | Self::Authority { directory, .. } => directory,
        }
    }
}

/// What goes to standard error.
#[derive(Clone, Debug)]
pub struct Log {
    pub filter: String,
    pub format: Format,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawConfig {
    node: String,
    cgroup: RawCgroups,
    catalog: RawDirectory,
    identity: RawIdentity,
    tunnel: RawTunnel,
    #[serde(default)]
    datapath: RawDatapath,
    #[serde(default)]
    admin: RawAdmin,
    #[serde(default)]
    log: RawLog,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default = "default_drain")]
    drain: String,
    ca: Option<ca::RawAuthority>,
}

/// One path, or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum RawCgroups {
    One(PathBuf),
    Several(Vec<PathBuf>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawDirectory {
    directory: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawIdentity {
    directory: PathBuf,
    ca: Option<RawAuthority>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawAuthority {
    address: Vec<SocketAddr>,
}

impl RawIdentity {
    fn checked(self) -> Result<Identity> {
        let Self { directory, ca } = self;
        let Some(ca) = ca else { return Ok(Identity::Files { directory }) };
        ensure!(!ca.address.is_empty(), "identity.ca.address: name at least one address, e.g. ['10.0.0.1:9416']");
        let addresses = ca.address.iter().map(ToString::to_string).collect();
        Ok(Identity::Authority { directory, addresses })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawTunnel {
    listen: Vec<SocketAddr>,
    connect_timeout: Option<String>,
    idle_timeout: Option<String>,
    max_streams_per_lane: Option<usize>,
    quic_grace: Option<String>,
    #[serde(default)]
    congestion_control: RawCongestion,
}

/// How lanes choose their congestion control.
#[derive(Clone, Copy, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
enum RawCongestion {
    #[default]
    Auto,
    System,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawDatapath {
    bpffs: PathBuf,
    pin: String,
    heartbeat_timeout: String,
}

impl Default for RawDatapath {
    fn default() -> Self {
        Self { bpffs: "/sys/fs/bpf".into(), pin: "nodemesh".into(), heartbeat_timeout: "2s".into() }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawLimits {
    connections: Option<usize>,
    threads: Option<NonZeroUsize>,
    polling: Option<f64>,
}

/// A tracing filter: `info`, `debug`, `info,mesh_userspace::tunnel=debug`.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawLog {
    level: Option<String>,
    format: RawFormat,
}

#[derive(Clone, Copy, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
enum RawFormat {
    #[default]
    Text,
    Json,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawAdmin {
    socket: PathBuf,
    listen: SocketAddr,
}

impl Default for RawAdmin {
    fn default() -> Self {
        Self {
            socket: crate::admin::DEFAULT_SOCKET.into(),
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 9415),
        }
    }
}

fn default_drain() -> String {
    "5s".into()
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// Says which file, line and field is wrong, and what would be right.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Ports on the node's own addresses that are the daemon's, and so no workload's.
    #[must_use]
    pub fn own_ports(&self) -> Vec<u16> {
        let authority = self.ca.iter().flat_map(|ca| ca.listen.iter().map(SocketAddr::port));
        [self.tunnel_port, self.admin.listen.port()].into_iter().chain(authority).collect()
    }

    fn parse(text: &str) -> Result<Self> {
        let raw: RawConfig = serde_saphyr::from_str(text)?;
        let node = NodeName::parse(&raw.node).context("node")?;
        ensure!(!raw.tunnel.listen.is_empty(), "tunnel.listen: name at least one address, e.g. [10.0.0.1:15008]");
        let port = raw.tunnel.listen[0].port();
        ensure!(
            raw.tunnel.listen.iter().all(|address| address.port() == port && port != 0),
            "tunnel.listen: all addresses share one port, the same on every node (15008 unless you have a reason)"
        );
        ensure!(
            is_pin_name(&raw.datapath.pin),
            "datapath.pin: one folder name of letters, digits, '-' and '_' (a BPF file system takes no others), \
             e.g. nodemesh"
        );
        let cgroups = match raw.cgroup {
            RawCgroups::One(path) => vec![path],
            RawCgroups::Several(paths) => paths,
        };
        ensure!(!cgroups.is_empty(), "cgroup: name the cgroup that holds the workloads, or a list of such cgroups");
        let mut tunnel = crate::tunnel::Config { listen: raw.tunnel.listen, ..crate::tunnel::Config::default() };
        tunnel.congestion = match raw.tunnel.congestion_control {
            RawCongestion::Auto => Congestion::Auto(netns::round_trip),
            RawCongestion::System => Congestion::System,
        };
        if let Some(text) = raw.tunnel.connect_timeout {
            tunnel.connect_timeout = duration(&text).context("tunnel.connectTimeout")?;
        }
        if let Some(text) = raw.tunnel.idle_timeout {
            tunnel.idle_timeout = duration(&text).context("tunnel.idleTimeout")?;
        }
        if let Some(text) = raw.tunnel.quic_grace {
            tunnel.quic_grace = duration(&text).context("tunnel.quicGrace")?;
        }
        if let Some(streams) = raw.tunnel.max_streams_per_lane {
            ensure!(streams > 0, "tunnel.maxStreamsPerLane: at least 1");
            tunnel.max_streams = streams;
        }
        Ok(Self {
            node,
            catalog: raw.catalog.directory,
            identity: raw.identity.checked()?,
            tunnel,
            tunnel_port: port,
            datapath: crate::datapath::Config {
                bpffs: raw.datapath.bpffs,
                pin: raw.datapath.pin,
                cgroups,
                heartbeat_timeout: duration(&raw.datapath.heartbeat_timeout).context("datapath.heartbeatTimeout")?,
                outbound_port: OUTBOUND_PORT,
                mark: OWN_MARK,
            },
            admin: crate::admin::Config { socket: raw.admin.socket, listen: raw.admin.listen },
            log: raw.log.checked()?,
            connections: raw.limits.connections()?,
            threads: raw.limits.threads()?,
            polling: raw.limits.polling()?,
            drain: duration(&raw.drain).context("drain")?,
            ca: raw.ca.map(ca::RawAuthority::checked).transpose()?,
        })
    }
}

fn is_pin_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

impl RawLimits {
    fn connections(&self) -> Result<usize> {
        let connections = self.connections.unwrap_or(MAX_CONNECTIONS);
        let is_sound = (1..=MAX_CONNECTIONS).contains(&connections);
        ensure!(is_sound, "limits.connections: from 1 to {MAX_CONNECTIONS}");
        Ok(connections)
    }

    fn threads(&self) -> Result<Option<NonZeroUsize>> {
        let is_sound = self.threads.is_none_or(|threads| threads.get() <= MAX_THREADS);
        ensure!(is_sound, "limits.threads: from 1 to {MAX_THREADS}");
        Ok(self.threads)
    }

    fn polling(&self) -> Result<f64> {
        let polling = self.polling.unwrap_or(POLLING);
        ensure!((0.0..=1.0).contains(&polling), "limits.polling: a share of one processor, from 0 (never) to 1");
        Ok(polling)
    }
}

impl RawLog {
    fn checked(self) -> Result<Log> {
        let filter = self.level.unwrap_or_else(|| "info".to_owned());
        Filter::parse(&filter).context("log.level")?;
        let format = match self.format {
            RawFormat::Text => Format::Text,
            RawFormat::Json => Format::Json,
        };
        Ok(Log { filter, format })
    }
}

/// Connections carried at once, if nothing else is said: descriptors run out before.
const MAX_CONNECTIONS: usize = 1_048_576;
/// Of one processor, for waiting awake.
const POLLING: f64 = 0.5;
/// More than any machine has processors.
const MAX_THREADS: usize = 4_096;
/// Port of the daemon's listeners inside workloads' network namespaces.
pub const OUTBOUND_PORT: u16 = 15001;
/// SO_MARK of the daemon's sockets inside workloads' network namespaces.
pub const OWN_MARK: u32 = 0x539;

/// Parses `500ms`, `2s`, `5m` or `12h`.
///
/// # Errors
/// If the text is not a whole number with one of these units, or zero.
pub fn duration(text: &str) -> Result<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let milliseconds: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => bail!("{text:?} is not a duration: write a whole number and ms, s, m or h, e.g. 500ms or 12h"),
    };
    let number: u64 = number.parse().with_context(|| format!("{text:?} does not start with a whole number"))?;
    let total = number.checked_mul(milliseconds).with_context(|| format!("{text:?} is too long"))?;
    ensure!(total > 0, "{text:?}: must be longer than nothing");
    Ok(Duration::from_millis(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "
node: n1
cgroup: /sys/fs/cgroup/pods
catalog: {directory: /etc/nodemesh/conf.d}
identity: {directory: /var/lib/nodemesh/identity}
tunnel: {listen: ['10.0.0.1:15008', '[fd00::1]:15008']}
";

    #[test]
    fn the_smallest_file_gets_sound_defaults() {
        let config = Config::parse(SMALLEST).unwrap();
        assert_eq!(config.node.as_str(), "n1");
        assert_eq!(config.datapath.cgroups, [PathBuf::from("/sys/fs/cgroup/pods")]);
        assert_eq!(config.admin.listen.port(), 9415);
        assert_eq!(config.datapath.pin, "nodemesh");
        assert_eq!(config.drain, Duration::from_secs(5));
        assert_eq!((config.connections, config.threads, config.polling), (1_048_576, None, 0.5));
    }

    #[test]
    fn several_cgroups_may_be_named() {
        let text = SMALLEST.replace("/sys/fs/cgroup/pods", "[/sys/fs/cgroup/pods, /sys/fs/cgroup/system]");
        assert_eq!(Config::parse(&text).unwrap().datapath.cgroups.len(), 2);
        let error = Config::parse(&SMALLEST.replace("/sys/fs/cgroup/pods", "[]")).unwrap_err();
        assert!(format!("{error:#}").contains("cgroup"), "{error:#}");
    }

    #[test]
    fn a_misspelt_field_is_named() {
        let error = Config::parse(&SMALLEST.replace("catalog", "catalogue")).unwrap_err();
        assert!(format!("{error:#}").contains("catalogue"), "{error:#}");
    }

    #[test]
    fn certificates_come_from_files_unless_an_authority_is_named() {
        let directory = PathBuf::from("/var/lib/nodemesh/identity");
        let files = Identity::Files { directory: directory.clone() };
        assert_eq!(Config::parse(SMALLEST).unwrap().identity, files);
        let text = SMALLEST.replace("nodemesh/identity}", "nodemesh/identity, ca: {address: ['10.0.0.1:9416']}}");
        let addresses = vec!["10.0.0.1:9416".to_owned()];
        assert_eq!(Config::parse(&text).unwrap().identity, Identity::Authority { directory, addresses });
    }

    #[test]
    fn unusable_values_are_refused_with_the_field() {
        for (from, to, field) in [
            ("node: n1", "node: N_1", "node"),
            ("['10.0.0.1:15008', '[fd00::1]:15008']", "[]", "tunnel.listen"),
            ("'[fd00::1]:15008'", "'[fd00::1]:15009'", "tunnel.listen"),
            ("}\n", "}\ndatapath: {pin: a/b}\n", "datapath.pin"),
            ("}\n", "}\ndrain: 5 minutes\n", "drain"),
            ("listen: [", "congestionControl: fast, listen: [", "congestionControl"),
            ("}\n", "}\nlimits: {connections: 0}\n", "limits.connections"),
            ("}\n", "}\nlimits: {threads: 5000}\n", "limits.threads"),
            ("}\n", "}\nlimits: {polling: 2}\n", "limits.polling"),
            ("nodemesh/identity}", "nodemesh/identity, ca: {address: []}}", "identity.ca.address"),
            ("nodemesh/identity}", "nodemesh/identity, ca: {address: [here]}}", "address"),
        ] {
            let error = format!("{:#}", Config::parse(&SMALLEST.replacen(from, to, 1)).unwrap_err());
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn durations_are_exact_or_refused() {
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("12h").unwrap(), Duration::from_secs(43_200));
        for bad in ["", "5", "s", "-1s", "1.5s", "5 s", "0s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
