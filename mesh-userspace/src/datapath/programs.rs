//! The object: its programs, loaded and attached through pinned links.

use super::bpf::{self, AttachType};
use super::cgroup::Cgroup;
use super::events::{self, Events};
use super::link::{self, Target};
use super::pins::Pins;
use anyhow::{Context as _, anyhow};
use aya::maps::RingBuf;
use aya::programs::{CgroupSock, CgroupSockAddr, Program, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use mesh_common::maps;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("NODEMESH_EBPF_OBJECT"));

/// Guards the namespaces of workloads.
const SK_LOOKUP: &str = "mesh_sk_lookup";
/// Guards the node's own namespace.
const NODE_LOOKUP: &str = "mesh_node_lookup";

/// The cgroups' programs, in the order in which they are attached: what serves a captured connection before what
/// captures it.
const CGROUP_PROGRAMS: [(&str, AttachType); 10] = [
    ("mesh_sock_create", AttachType::SockCreate),
    ("mesh_sock_ops", AttachType::SockOps),
    ("mesh_getpeername4", AttachType::Getpeername4),
    ("mesh_getpeername6", AttachType::Getpeername6),
    ("mesh_recvmsg4", AttachType::Recvmsg4),
    ("mesh_recvmsg6", AttachType::Recvmsg6),
    ("mesh_sendmsg4", AttachType::Sendmsg4),
    ("mesh_sendmsg6", AttachType::Sendmsg6),
    ("mesh_connect4", AttachType::Connect4),
    ("mesh_connect6", AttachType::Connect6),
];

/// Threads that have programs checked, at most.
const LOADERS: usize = 4;

/// An attachment as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedLink {
    /// The pin's file name: the program's name and the cgroup's id, or the namespace's name.
    pub name: String,
    /// The kernel's id of the link.
    pub link: u32,
    /// The kernel's id of the program that it runs.
    pub program: u32,
}

/// Gives the kernel back what loading took and freed: the loader parses the kernel's BTF whether it is used or not, and
/// the allocator would keep those pages for a daemon that never needs them again.
fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only returns free pages of the heap, takes its own locks, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The loaded object.
pub(super) struct Programs(Ebpf);

impl Programs {
    /// Loads the object; maps that are pinned are used, others are made and pinned.
    pub(super) fn load(pins: &Pins) -> anyhow::Result<Self> {
        let mut loader = EbpfLoader::new();
        for spec in maps::ALL {
            loader.map_pin_path(spec.name, pins.map(spec.name));
        }
        // The programs read no kernel structure, so there is nothing to relocate against the kernel's own BTF, which
        // takes tens of megabytes to hold. (The object's BTF, which ORIG needs, is loaded in any case.)
        let mut ebpf = loader.btf(None).load(OBJECT).context("cannot load the eBPF object")?;
        load_all(ebpf.programs_mut())?;
        drop(loader);
        return_freed_memory();
        Ok(Self(ebpf))
    }

    /// Attaches to the cgroups, and to no other any more; brings the namespaces' links that a predecessor left to this
    /// object's programs.
    pub(super) fn attach(&self, pins: &Pins, cgroups: &[Cgroup]) -> anyhow::Result<()> {
        let node = pins.node();
        for pin in pins.netns_pins()? {
            link::refresh(&pin, self.program(if pin == node { NODE_LOOKUP } else { SK_LOOKUP })?)?;
        }
        for (name, kind) in CGROUP_PROGRAMS {
            for cgroup in cgroups {
                let target = Target { fd: cgroup.directory.as_fd(), id: cgroup.id };
                link::ensure(&cgroup_pin(pins, name, cgroup), self.program(name)?, target, kind)?;
            }
        }
        let wanted = |pin: &PathBuf| {
            CGROUP_PROGRAMS.iter().any(|(name, _)| cgroups.iter().any(|c| cgroup_pin(pins, name, c) == *pin))
        };
        pins.link_pins()?.iter().filter(|pin| !wanted(pin)).try_for_each(|pin| link::remove(pin))
    }

    /// Guards a workload's network namespace.
    pub(super) fn guard(&self, pin: &Path, netns: Target<'_>) -> anyhow::Result<()> {
        link::ensure(pin, self.program(SK_LOOKUP)?, netns, AttachType::SkLookup)
    }

    /// Guards the declared ports of the node's own network namespace.
    pub(super) fn guard_node(&self, pin: &Path, netns: Target<'_>) -> anyhow::Result<()> {
        link::ensure(pin, self.program(NODE_LOOKUP)?, netns, AttachType::SkLookup)
    }

    pub(super) fn events(&mut self) -> anyhow::Result<Events> {
        let map = self.0.take_map(maps::EVENTS.name).context("the events are already being read")?;
        Events::new(RingBuf::try_from(map).context("cannot map the kernel's events")?)
    }

    pub(super) fn kernel_log(&mut self) -> anyhow::Result<Option<impl Future<Output = io::Result<()>> + Send + use<>>> {
        events::kernel_log(&mut self.0)
    }

    fn program(&self, name: &str) -> anyhow::Result<BorrowedFd<'_>> {
        let program = self.0.program(name).with_context(|| format!("the eBPF object has no program {name}"))?;
        let fd = match program {
            Program::CgroupSockAddr(program) => CgroupSockAddr::fd(program),
            Program::CgroupSock(program) => CgroupSock::fd(program),
            Program::SockOps(program) => SockOps::fd(program),
            Program::SkLookup(program) => SkLookup::fd(program),
            other => return Err(anyhow!("program {name} is of the unexpected type {:?}", other.prog_type())),
        };
        Ok(fd.with_context(|| format!("program {name} is not loaded"))?.as_fd())
    }
}

/// Has the kernel check the programs, on several processors: on one it was half of the daemon's start.
fn load_all<'a>(programs: impl Iterator<Item = (&'a str, &'a mut Program)> + Send) -> anyhow::Result<()> {
    let waiting = Mutex::new(programs);
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let load = || {
        while let Some((name, program)) = next() {
            load(name, program)?;
        }
        anyhow::Ok(())
    };
    let helpers = thread::available_parallelism().map_or(0, |count| count.get() - 1).min(LOADERS - 1);
    thread::scope(|scope| {
        // One that cannot be started leaves its share to this thread.
        let helper = |_| thread::Builder::new().name("loader".to_owned()).spawn_scoped(scope, load).ok();
        let helpers: Vec<_> = (0..helpers).filter_map(helper).collect();
        let own = load();
        let all = helpers.into_iter().map(|helper| helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
        all.chain([own]).collect()
    })
}

fn load(name: &str, program: &mut Program) -> anyhow::Result<()> {
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        other => return Err(anyhow!("program {name} is of the unexpected type {:?}", other.prog_type())),
    };
    loaded.with_context(|| format!("the kernel refuses program {name}"))
}

fn cgroup_pin(pins: &Pins, program: &str, cgroup: &Cgroup) -> PathBuf {
    pins.link(&format!("{program}_{:x}", cgroup.id))
}

/// The links under the pin folder.
pub(super) fn links(pins: &Pins) -> anyhow::Result<Vec<AttachedLink>> {
    let mut links = Vec::new();
    for pin in pins.link_pins()?.into_iter().chain(pins.netns_pins()?) {
        let Some(link) = link::open(&pin)? else { continue };
        let info = bpf::link_state(link.as_fd()).with_context(|| format!("cannot inspect {}", pin.display()))?;
        let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
        links.push(AttachedLink { name, link: info.id, program: info.program });
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn object() -> aya_obj::Object {
        aya_obj::Object::parse(OBJECT).unwrap()
    }

    #[test]
    fn the_objects_maps_are_those_of_the_contract() {
        let object = object();
        for spec in maps::ALL {
            let map = object.maps.get(spec.name).unwrap_or_else(|| panic!("the object has no map {}", spec.name));
            let (kind, flags) = (map.map_type(), map.map_flags());
            assert!(
                spec.describes(kind, map.key_size(), map.value_size(), map.max_entries(), flags),
                "{spec:?} is in the object as {map:?}"
            );
        }
        let specified: BTreeSet<&str> = maps::ALL.iter().map(|spec| spec.name).collect();
        // Constants are the compiler's, AYA_LOGS is there in objects built with logs.
        let own = |name: &&str| !name.starts_with('.') && *name != "AYA_LOGS";
        let present: BTreeSet<&str> = object.maps.keys().map(String::as_str).filter(own).collect();
        assert_eq!(present, specified);
    }

    #[test]
    fn the_objects_programs_are_those_that_are_attached() {
        let object = object();
        let present: BTreeSet<&str> = object.programs.keys().map(String::as_str).collect();
        let attached: BTreeSet<&str> =
            CGROUP_PROGRAMS.iter().map(|(name, _)| *name).chain([SK_LOOKUP, NODE_LOOKUP]).collect();
        assert_eq!(present, attached);
        assert_eq!(object.license.to_bytes(), b"Dual MIT/GPL");
    }
}
