//! A network namespace of the testbed.

use crate::ip;
use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Where `ip netns` keeps namespaces.
pub(crate) const FOLDER: &str = "/run/netns";

/// A named network namespace; dropping it removes the name, and with the last process and socket in it, itself.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    path: PathBuf,
}

impl Namespace {
    /// Makes it, with its loopback up.
    pub(crate) fn create(name: String) -> Result<Self> {
        ip::netns("add", &name)?;
        let path = Path::new(FOLDER).join(&name);
        let namespace = Self { name, path };
        namespace.ip(&["link set dev lo up".into()])?;
        // No address here is anybody else's. Asking first delays the first IPv6 answers by two seconds.
        namespace.set_sysctls(&[("ipv6/conf/all/accept_dad", "0"), ("ipv6/conf/default/accept_dad", "0")])?;
        Ok(namespace)
    }

    /// As `ip netns` knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it can be opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `ip` commands inside.
    ///
    /// # Errors
    /// If one is refused; the later ones have not run then.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        ip::batch(&self.name, lines)
    }

    /// Runs a closure inside: see [`enter`].
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        enter(&self.path, inside)
    }

    /// Sets values under `/proc/sys/net`, as `("ipv4/ip_forward", "1")`.
    ///
    /// # Errors
    /// If the kernel refuses one.
    pub fn set_sysctls(&self, values: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            values.iter().try_for_each(|(key, value)| {
                std::fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| format!("cannot set net/{key}"))
            })
        })?
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip::netns("del", &self.name) {
            eprintln!("testbed: {error:#}");
        }
    }
}

/// Runs a closure on a thread of its own inside a namespace. Sockets that it returns stay in the namespace.
///
/// # Errors
/// If the namespace cannot be entered.
pub fn enter<T: Send>(path: &Path, inside: impl FnOnce() -> T + Send) -> Result<T> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .with_context(|| format!("cannot enter the namespace {}", path.display()))?;
            Ok(inside())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
