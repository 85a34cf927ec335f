//! Loading, dying, taking over, leaving.

use crate::bed::{Bed, Netns, cgroup_root, connect, counted, link_exists, pod_entry, program_exists, wait_until};
use crate::capture::{Listeners, accept, frontend, services};
use mesh_common::Ip;
use mesh_common::maps;
use mesh_common::outcome::Outcome;
use mesh_common::policy::{Matched, VerdictKey};
use mesh_common::service::{AppPort, AppPortKey, RangeKey};
use mesh_userspace::datapath::{AttachedLink, Config, Datapath, cleanup};
use mesh_userspace::engine::MapOp;
use socket2::{Domain, Protocol};
use std::fs;
use std::os::fd::AsFd;

fn is_mounted(config: &Config) -> bool {
    fs::read_to_string("/proc/self/mounts").unwrap().contains(config.bpffs.to_str().unwrap())
}

fn assert_gone(links: &[AttachedLink]) {
    for link in links {
        assert!(!link_exists(link.link), "{link:?} is still there");
        // The kernel frees programs a moment later.
        wait_until("the programs to go", || !program_exists(link.program));
    }
}

#[test]
fn the_root_cgroup_is_refused() {
    let bed = Bed::new();
    let config = Config { cgroups: vec![cgroup_root()], ..bed.config.clone() };
    let error = format!("{:#}", Datapath::load(&config).err().expect("a refusal"));
    assert!(error.contains("root of the cgroup hierarchy"), "{error}");
    assert!(!config.bpffs.exists(), "nothing was made");
}

#[test]
fn unloading_leaves_nothing() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let links = datapath.links().unwrap();
    assert_eq!(links.len(), 11, "{links:?}");
    assert!(is_mounted(&bed.config), "the datapath mounted a bpffs, since none was there");
    datapath.unload().unwrap();
    assert_gone(&links);
    assert!(!is_mounted(&bed.config));
    assert_eq!(fs::read_dir(&bed.config.bpffs).unwrap().count(), 0);
}

#[test]
fn a_mount_of_others_stays_and_so_do_their_pins() {
    let bed = Bed::new();
    let first = bed.armed();
    let second = Datapath::load(&Config { pin: "second".into(), ..bed.config.clone() }).unwrap();
    first.unload().unwrap();
    assert!(is_mounted(&bed.config), "the second one still uses it");
    let links = second.links().unwrap();
    assert!(links.iter().all(|link| link_exists(link.link)));
    second.unload().unwrap();
    assert!(!is_mounted(&bed.config));
}

#[test]
fn two_daemons_do_not_share_pins() {
    let bed = Bed::new();
    let datapath = bed.armed();
    let error = format!("{:#}", Datapath::load(&bed.config).err().expect("a refusal"));
    assert!(error.contains("another nodemeshd is running"), "{error}");
    assert!(cleanup(&bed.config).is_err());
    datapath.unload().unwrap();
}

#[test]
fn a_successor_takes_over_in_place() {
    let bed = Bed::new();
    let listeners = Listeners::bind(&bed);
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let before = datapath.links().unwrap();
    let captured = |datapath: &Datapath| {
        connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), "10.96.0.1:80").unwrap();
        drop(accept(&bed, datapath, &listeners.v4));
    };
    captured(&datapath);
    // The daemon dies: its descriptors close, its pins stay.
    drop(datapath);
    let waiting = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    connect(&waiting, "10.96.0.1:80").unwrap();
    let (_, from) = listeners.v4.accept().unwrap();

    let mut datapath = Datapath::load(&bed.config).unwrap();
    let after = datapath.links().unwrap();
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(&after) {
        assert_eq!((&before.name, before.link), (&after.name, after.link), "the link is the same");
        assert_ne!(before.program, after.program, "its program is the successor's");
    }
    let stale = mesh_common::flow::TupleKey::new(bed.pod.cookie(), from.ip().into(), from.port().to_be());
    assert_eq!(datapath.tuples().take(&stale).unwrap(), None, "records of dead connections are gone");
    // Captured before anything is armed anew: the tables are the predecessor's.
    captured(&datapath);
    assert_eq!(counted(&datapath, Outcome::ConnectCaptured), 3, "the counters go on");

    // The first desired state replaces the predecessor's, and what is not armed again goes.
    datapath.apply(&[frontend("10.96.0.1:80", 1)]).unwrap();
    let usage = |datapath: &Datapath, name: &str| {
        let usage = datapath.counters().map_usage();
        usage.iter().find(|usage| usage.name == name).unwrap().entries
    };
    assert_eq!(usage(&datapath, maps::SVC.name), 1);
    captured(&datapath);
    datapath.attach_netns("default/pod.1", bed.pod.as_fd()).unwrap();
    datapath.arm_pod(bed.pod.cookie(), pod_entry(0)).unwrap();
    datapath.settle().unwrap();
    captured(&datapath);
    assert_eq!(datapath.links().unwrap(), after);
    // A later difference removes only what it says.
    datapath.apply(&[frontend("10.96.0.7:80", 1)]).unwrap();
    captured(&datapath);
    drop(datapath);

    let mut datapath = Datapath::load(&bed.config).unwrap();
    datapath.apply(&services()).unwrap();
    datapath.settle().unwrap();
    assert_eq!(usage(&datapath, maps::PODS.name), 0, "a pod that nobody armed again is not captured");
    assert_eq!(datapath.links().unwrap().len(), 10, "nor guarded");
    let links = datapath.links().unwrap();
    datapath.unload().unwrap();
    assert_gone(&links);
}

#[test]
fn leftovers_that_do_not_fit_are_replaced() {
    let bed = Bed::new();
    let datapath = bed.armed();
    let before = datapath.links().unwrap();
    drop(datapath);
    fs::remove_file(bed.config.bpffs.join(&bed.config.pin).join("maps").join(maps::TUPLES.name)).unwrap();
    let datapath = Datapath::load(&bed.config).unwrap();
    assert_gone(&before);
    assert_eq!(datapath.links().unwrap().len(), 10);
    datapath.unload().unwrap();
}

#[test]
fn the_guard_of_a_vanished_namespace_is_removed() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let passing = Netns::new();
    bed.pod.ip(&format!("link add gone type veth peer name eth0 netns {}", passing.thread_id()));
    datapath.attach_netns("passing", passing.as_fd()).unwrap();
    assert_eq!(datapath.links().unwrap().len(), 12);
    drop(datapath);
    drop(passing);
    // Its end of the wire goes with it.
    wait_until("the namespace to vanish", || !bed.pod.ip_succeeds("link show gone"));
    let datapath = Datapath::load(&bed.config).unwrap();
    assert_eq!(datapath.links().unwrap().len(), 11);
    datapath.unload().unwrap();
}

#[test]
fn cleaning_up_after_a_crash_leaves_nothing_and_may_be_repeated() {
    let bed = Bed::new();
    cleanup(&bed.config).unwrap();
    let datapath = bed.armed();
    let links = datapath.links().unwrap();
    drop(datapath);
    cleanup(&bed.config).unwrap();
    assert_gone(&links);
    assert!(!is_mounted(&bed.config));
    cleanup(&bed.config).unwrap();
}

#[test]
fn a_full_table_is_reported_and_what_was_half_written_is_made_right() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let port = |index: u32| MapOp::SetAppPort(app_port(index), AppPort::new(1, 0));
    let entries = |datapath: &Datapath| {
        let usage = datapath.counters().map_usage();
        usage.iter().find(|usage| usage.name == maps::APPPORTS.name).unwrap().entries
    };
    datapath.apply(&[port(0), port(1)]).unwrap();
    let too_many: Vec<MapOp> = (0..=maps::MAX_APP_PORTS).map(port).collect();
    let error = format!("{:#}", datapath.apply(&too_many).unwrap_err());
    assert!(error.contains(maps::APPPORTS.name), "{error}");
    assert_eq!(entries(&datapath), u64::from(maps::MAX_APP_PORTS));
    datapath.distrust_tables();
    datapath.apply(&[port(0)]).unwrap();
    assert_eq!(entries(&datapath), 1, "what the failed change had written is gone");
    datapath.unload().unwrap();
}

#[test]
fn what_a_predecessor_left_makes_room_for_what_is_wanted_now() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let port = |index: u32| MapOp::SetAppPort(app_port(index), AppPort::new(1, 0));
    datapath.apply(&(0..maps::MAX_APP_PORTS).map(port).collect::<Vec<_>>()).unwrap();
    // As after a start: what the tables hold is a predecessor's.
    datapath.distrust_tables();
    let wanted: Vec<MapOp> = (maps::MAX_APP_PORTS - 10..maps::MAX_APP_PORTS + 10).map(port).collect();
    datapath.apply(&wanted).unwrap();
    let usage = datapath.counters().map_usage();
    assert_eq!(usage.iter().find(|usage| usage.name == maps::APPPORTS.name).unwrap().entries, 20);
    datapath.unload().unwrap();
}

#[test]
fn policies_that_find_no_room_leave_those_in_force_whole() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let entries = |datapath: &Datapath, map: &str| {
        let usage = datapath.counters().map_usage();
        usage.iter().find(|usage| usage.name == map).unwrap().entries
    };
    let verdict =
        |group: u32, source: u32| MapOp::SetVerdict(VerdictKey::new(group, source, 0), Matched::new(1, 0, 0, 0, 0, 0));
    let range = |group: u32, index: u32| {
        let [a, b, c, d] = index.to_be_bytes();
        MapOp::SetRange(160, RangeKey::new(group, Ip::from_v4([10 + a, b, c, d])), 1 << 31)
    };
    let in_force: Vec<MapOp> = (0..100).map(|n| verdict(1, n)).chain((0..100).map(|n| range(1, n))).collect();
    datapath.apply(&in_force).unwrap();
    let verdicts = (0..maps::MAX_VERDICTS).map(|n| verdict(2, n)).collect::<Vec<_>>();
    let ranges = (0..maps::MAX_RANGES).map(|n| range(2, n)).collect::<Vec<_>>();
    for (map, too_many) in [(maps::VERDICTS, verdicts), (maps::RANGES, ranges)] {
        let error = format!("{:#}", datapath.apply(&too_many).unwrap_err());
        assert!(error.contains(map.name), "{error}");
        assert_eq!(entries(&datapath, map.name), u64::from(map.max_entries));
        datapath.distrust_tables();
        datapath.apply(&in_force).unwrap();
        assert_eq!(entries(&datapath, map.name), 100, "what was in force, and nothing else");
    }
    datapath.unload().unwrap();
}

fn app_port(index: u32) -> AppPortKey {
    let [a, b, c, d] = index.to_be_bytes();
    AppPortKey::new(Ip::from_v4([10 + a, b, c, d]), 0)
}

#[test]
fn idle_maps_stay_within_their_budget() {
    let bed = Bed::new();
    let datapath = bed.armed();
    let usage = datapath.counters().map_usage();
    let bytes: u64 = usage.iter().map(|usage| usage.bytes).sum();
    for map in &usage {
        println!("{:9} {:>7}/{:<7} {:>9} bytes", map.name, map.entries, map.capacity, map.bytes);
    }
    println!("idle map memory: {bytes} bytes");
    assert_eq!(usage.len(), maps::ALL.len());
    assert!(bytes > 0 && bytes <= maps::IDLE_BUDGET_BYTES, "{bytes} bytes");
    datapath.unload().unwrap();
}
