//! Makes a small world with a process in it and waits for the end of its input: something to be killed by a test of
//! the sweeper. `mesh-world sweep` removes what killed owners left behind.

use anyhow::{Context, Result};
use mesh_tests::program::Program;
use mesh_tests::sweep::sweep;
use mesh_tests::world::World;
use rustix::mount::{MountFlags, mount};
use std::io::Read;

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("sweep") {
        let swept = sweep()?;
        for (kind, names) in
            [("control group", swept.cgroups), ("namespace", swept.namespaces), ("folder", swept.folders)]
        {
            for name in names {
                println!("removed the {kind} {name}");
            }
        }
        return Ok(());
    }
    let world = World::named("killed").node("n1").pod("p").build()?;
    let pod = world.pod("p");
    let bpffs = world.node("n1").folder().join("bpffs");
    std::fs::create_dir(&bpffs)?;
    mount("bpffs", &bpffs, "bpf", MountFlags::empty(), None).context("cannot mount a bpffs")?;
    let sleeper = Program::new("sleep").args(["1000"]).start_in(pod)?;
    let group = pod.cgroup().ancestors().nth(3).context("a pod's group is below its world's")?;
    println!("{} {} {} {}", group.display(), pod.namespace().path().display(), world.folder().display(), sleeper.pid());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
