//! The kernel side of the node: loads the eBPF object, attaches it, writes its tables, reads what it reports. The only
//! user of aya.
//!
//! What must survive the daemon is pinned under `<bpffs>/<pin>`; dropping a [`Datapath`] closes descriptors and leaves
//! the pins to the next start, as a crash does. [`Datapath::unload`] takes everything away.

mod bpf;
mod cgroup;
mod counters;
mod events;
mod flows;
mod hosts;
mod link;
mod pins;
mod programs;
mod table;
mod tables;

pub use cgroup::WorkloadCgroup;
pub use counters::{Counters, MapUsage};
pub use events::{Event, Events};
pub use flows::{Admission, Admissions, Aliases, Bypass, Heartbeat, Introduction, Tuples, monotonic_nanoseconds};
pub use programs::AttachedLink;

use crate::engine::MapOp;
use anyhow::{Context as _, ensure};
use cgroup::Cgroup;
use counters::Measured;
use hosts::Hosts;
use link::Target;
use mesh_common::ABI_VERSION;
use mesh_common::flow::{Admitted, OriginalDestination, TupleKey};
use mesh_common::maps::{self, CfgSlot, Spec};
use mesh_common::service::{BypassKey, Pod};
use pins::Pins;
use programs::Programs;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use table::{OwnTable, Table};
use tables::Tables;

/// What the datapath needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// A BPF file system; mounted here if none is.
    pub bpffs: PathBuf,
    /// Folder of the pins in it; one daemon at a time.
    pub pin: String,
    /// The cgroup v2 directories below which workloads run; never the root, and none within another.
    pub cgroups: Vec<PathBuf>,
    /// Silence of the daemon after which new captures are refused; zero never refuses.
    pub heartbeat_timeout: Duration,
    /// Port of the daemon's listeners inside workloads' namespaces.
    pub outbound_port: u16,
    /// SO_MARK of the daemon's own sockets, which are never captured.
    pub mark: u32,
}

/// The loaded, attached, pinned programs and their maps.
pub struct Datapath {
    pins: Pins,
    programs: Programs,
    tables: Tables,
    settings: Table<u32, u64>,
    tuples: Table<TupleKey, OriginalDestination>,
    bypass: Table<BypassKey, u64>,
    admitted: Table<BypassKey, Admitted>,
    aliases: Aliases,
    counters: Counters,
    /// The tables may hold what nobody here knows: a predecessor's entries, or those of an apply that failed half-way.
    inherited: bool,
    pods: BTreeSet<u64>,
    hosts: Hosts,
    namespaces: BTreeSet<String>,
}

impl Datapath {
    /// Loads the programs, pins their maps and links, and attaches them to the cgroups. Takes over in place what a
    /// predecessor left, if it had the same ABI: no connect() escapes meanwhile; else replaces it.
    ///
    /// Nothing is captured before [`Datapath::arm_pod`], and captures are refused before the first
    /// [`Heartbeat::beat`].
    ///
    /// # Errors
    ///
    /// Not a cgroup v2 directory, its root, or one within another; another daemon has the pins; the kernel refuses a program (the
    /// verifier's log is in the error), a map or an attachment. What this call made is taken away again.
    pub fn load(config: &Config) -> anyhow::Result<Self> {
        let cgroups = Cgroup::open_all(&config.cgroups)?;
        let pins = Pins::open(&config.bpffs, &config.pin)?;
        let adopted = pins.are_adoptable()?;
        if adopted {
            tracing::info!("taking over the programs and tables of the daemon before this one");
        } else {
            pins.clear()?;
        }
        match Parts::start(config, &cgroups, &pins, adopted) {
            Ok(parts) => Ok(parts.into_datapath(pins)),
            // A predecessor's links go on protecting its workloads.
            Err(error) if adopted => Err(error),
            Err(error) => match pins.clear().and_then(|()| pins.release()) {
                Ok(()) => Err(error),
                Err(cleanup) => Err(error.context(format!("and cannot clean up: {cleanup:#}"))),
            },
        }
    }

    /// Writes the tables, in the order given. The first call after [`Datapath::load`] must lead from empty tables to
    /// the desired ones: whatever else a predecessor left in them is removed after it.
    ///
    /// # Errors
    ///
    /// A map is full or cannot be written; the operations before it are done.
    pub fn apply(&mut self, ops: &[MapOp]) -> anyhow::Result<()> {
        let mut written = self.write(ops);
        if written.is_err() && self.inherited {
            // What a predecessor left may take the room. Where a policy group goes before its last reference does,
            // nothing passes until the new one is there.
            self.tables.retain_set_by(ops)?;
            written = self.write(ops);
        }
        written?;
        if self.inherited {
            self.tables.retain_set_by(ops)?;
            self.inherited = false;
        }
        Ok(())
    }

    fn write(&self, ops: &[MapOp]) -> anyhow::Result<()> {
        let mut are_switched = false;
        for op in ops {
            match op {
                MapOp::SetDeniedErrno(errno) => self
                    .settings
                    .set(&(CfgSlot::DeniedErrno as u32), &u64::from(*errno))
                    .context("cannot write map CFG")?,
                MapOp::RemoveVerdict(_) if !are_switched => {
                    are_switched = true;
                    tables::wait_for_running_programs();
                    self.tables.apply(op)?;
                }
                op => self.tables.apply(op)?,
            }
        }
        Ok(())
    }

    /// Takes the tables for what a predecessor left, after an [`Datapath::apply`] that failed half-way: what they hold
    /// is known to nobody then. The next call must lead from empty tables to the desired ones.
    pub fn distrust_tables(&mut self) {
        self.inherited = true;
    }

    /// Starts capturing the connects of a network namespace: the last step of arming a workload.
    ///
    /// # Errors
    ///
    /// The map is full or cannot be written.
    pub fn arm_pod(&mut self, cookie: u64, pod: Pod) -> anyhow::Result<()> {
        self.tables.pods.set(&cookie, &pod)?;
        self.pods.insert(cookie);
        Ok(())
    }

    /// Stops capturing: the first step of disarming. A namespace that is not armed is no error.
    ///
    /// # Errors
    ///
    /// The map cannot be written.
    pub fn disarm_pod(&mut self, cookie: u64) -> anyhow::Result<()> {
        self.tables.pods.remove(&cookie)?;
        self.pods.remove(&cookie);
        Ok(())
    }

    /// Guards a network namespace with `sk_lookup`. `name` identifies it across restarts: the workload's uid.
    ///
    /// # Errors
    ///
    /// The kernel refuses the attachment.
    pub fn attach_netns(&mut self, name: &str, netns: BorrowedFd<'_>) -> anyhow::Result<()> {
        let inode = rustix::fs::fstat(netns).context("cannot inspect the network namespace")?.st_ino;
        self.programs.guard(&self.pins.netns(name), Target { fd: netns, id: inode })?;
        self.namespaces.insert(name.to_owned());
        Ok(())
    }

    /// Takes the guard away. A namespace that has none, or is gone, is no error.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn detach_netns(&mut self, name: &str) -> anyhow::Result<()> {
        link::remove(&self.pins.netns(name))?;
        self.namespaces.remove(name);
        Ok(())
    }

    /// Drops what a predecessor left and this daemon has neither armed nor attached since: call it once the first
    /// desired state is armed.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        self.tables.pods.retain(|cookie| self.pods.contains(cookie))?;
        self.hosts.settle(&self.settings)?;
        let names: Vec<&str> = self.namespaces.iter().map(String::as_str).collect();
        self.pins.retain_netns(&names, self.hosts.is_guarded())
    }

    /// The handle that takes captured connections' records.
    #[must_use]
    pub fn tuples(&self) -> Tuples {
        Tuples(self.tuples.clone())
    }

    /// The handle that announces deliveries.
    #[must_use]
    pub fn bypass(&self) -> Bypass {
        Bypass(self.bypass.clone())
    }

    /// The handle that lists what the kernel carries.
    #[must_use]
    pub fn admissions(&self) -> Admissions {
        Admissions(self.admitted.clone())
    }

    /// The handle that says whom aliases stand for.
    #[must_use]
    pub fn aliases(&self) -> Aliases {
        self.aliases.clone()
    }

    /// What a namespace is armed as, perhaps by a predecessor.
    ///
    /// # Errors
    ///
    /// The map cannot be read.
    pub fn pod(&self, cookie: u64) -> anyhow::Result<Option<Pod>> {
        self.tables.pods.get(&cookie)
    }

    /// The handle that shows the kernel that the daemon lives.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat(self.settings.clone())
    }

    /// The handle that reads the kernel's counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// What the programs report; call it once, within a runtime.
    ///
    /// # Errors
    ///
    /// Called twice, or the ring buffer cannot be mapped.
    pub fn events(&mut self) -> anyhow::Result<Events> {
        self.programs.events()
    }

    /// Forwards the programs' debug logs to the `log` crate; `None` if the object was built without them. Call it
    /// once, within a runtime.
    ///
    /// # Errors
    ///
    /// The log's ring buffer cannot be mapped.
    pub fn kernel_log(&mut self) -> anyhow::Result<Option<impl Future<Output = io::Result<()>> + Send + use<>>> {
        self.programs.kernel_log()
    }

    /// The attached links: what they are and which program they run.
    ///
    /// # Errors
    ///
    /// A pin cannot be opened.
    pub fn links(&self) -> anyhow::Result<Vec<AttachedLink>> {
        programs::links(&self.pins)
    }

    /// Detaches and unpins everything; leaves no link, pin or program, and no mount that nodemesh made.
    ///
    /// # Errors
    ///
    /// Something cannot be taken away; [`cleanup`] may be tried later.
    pub fn unload(self) -> anyhow::Result<()> {
        self.pins.clear()?;
        self.pins.release()
    }
}

/// Takes away what a dead daemon with this configuration left; nothing there is no error.
///
/// # Errors
///
/// A daemon is running with these pins, or something cannot be taken away.
pub fn cleanup(config: &Config) -> anyhow::Result<()> {
    let Some(pins) = Pins::find(&config.bpffs, &config.pin)? else { return Ok(()) };
    pins.clear()?;
    pins.release()
}

/// Everything of a datapath but the pins, which outlive a failed start.
struct Parts {
    programs: Programs,
    tables: Tables,
    settings: Table<u32, u64>,
    tuples: Table<TupleKey, OriginalDestination>,
    bypass: Table<BypassKey, u64>,
    admitted: Table<BypassKey, Admitted>,
    aliases: Aliases,
    counters: Counters,
    hosts: Hosts,
}

impl Parts {
    fn start(config: &Config, cgroups: &[Cgroup], pins: &Pins, adopted: bool) -> anyhow::Result<Self> {
        let programs = Programs::load(pins)?;
        let maps = maps::ALL.iter().map(|spec| measured(pins, spec)).collect::<anyhow::Result<Vec<_>>>()?;
        let map = |spec: &Spec| {
            let found = maps.iter().find(|measured| measured.spec.name == spec.name);
            found.map(|measured| Arc::clone(&measured.map)).with_context(|| format!("no map {}", spec.name))
        };
        let tables = Tables::open(map)?;
        let settings = Table::new(map(&maps::CFG)?, &maps::CFG)?;
        let tuples = Table::new(map(&maps::TUPLES)?, &maps::TUPLES)?;
        let bypass = Table::new(map(&maps::BYPASS)?, &maps::BYPASS)?;
        let admitted = Table::new(map(&maps::ADMITTED)?, &maps::ADMITTED)?;
        let aliases = Aliases {
            aliases: Table::new(map(&maps::ALIASES)?, &maps::ALIASES)?,
            callers: Table::new(map(&maps::CALLERS)?, &maps::CALLERS)?,
        };
        let hosts = Hosts::new(config, cgroups, OwnTable::new(map(&maps::HOSTS)?, &maps::HOSTS)?, &settings)?;
        let mut own = tables.counts();
        own.insert(maps::HOSTS.name, hosts.count());
        let counters = Counters::new(maps, own)?;
        let parts = Self { programs, tables, settings, tuples, bypass, admitted, aliases, counters, hosts };
        if adopted {
            // Their connections died with the predecessor; those that the kernel carries did not. A record of a connect in progress is lost with them: reset.
            parts.tuples.clear()?;
            parts.bypass.clear()?;
            parts.aliases.callers.clear()?;
            parts.aliases.aliases.clear()?;
        }
        parts.configure(config)?;
        parts.programs.attach(pins, cgroups)?;
        Ok(parts)
    }

    /// The version goes last: maps of a start that did not get this far are nobody's to adopt.
    fn configure(&self, config: &Config) -> anyhow::Result<()> {
        let timeout =
            u64::try_from(config.heartbeat_timeout.as_nanos()).context("the heartbeat timeout is too long")?;
        ensure!(config.outbound_port != 0, "the outbound port must not be 0");
        let settings = [
            (CfgSlot::HeartbeatTimeout, timeout),
            (CfgSlot::OwnMark, u64::from(config.mark)),
            (CfgSlot::OutboundPort, u64::from(config.outbound_port)),
            (CfgSlot::AbiVersion, u64::from(ABI_VERSION)),
        ];
        for (slot, value) in settings {
            self.settings.set(&(slot as u32), &value).context("cannot write map CFG")?;
        }
        Ok(())
    }

    fn into_datapath(self, pins: Pins) -> Datapath {
        Datapath {
            pins,
            programs: self.programs,
            tables: self.tables,
            settings: self.settings,
            tuples: self.tuples,
            bypass: self.bypass,
            admitted: self.admitted,
            aliases: self.aliases,
            counters: self.counters,
            inherited: true,
            pods: BTreeSet::new(),
            hosts: self.hosts,
            namespaces: BTreeSet::new(),
        }
    }
}

fn measured(pins: &Pins, spec: &'static Spec) -> anyhow::Result<Measured> {
    let map: OwnedFd =
        bpf::get_object(&pins.map(spec.name)).with_context(|| format!("cannot open map {}", spec.name))?;
    debug_assert!(bpf::map_shape(map.as_fd()).is_ok());
    Ok(Measured { spec, map: Arc::new(map) })
}
