//! nodemesh's testbed: nodes and pods as network namespaces on one kernel, one daemon per node, real programs inside.
//!
//! A scenario reads like topology:
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use mesh_tests::{program::Program, world::World};
//!
//! let world = World::named("example").node("n1").pod("client").node("n2").pod("web").build()?;
//! let web = world.pod("web");
//! let mut server = Program::probe(["echo", "--port", "8080"]).start_in(web)?;
//! server.wait_for_listener(8080)?;
//! # Ok(())
//! # }
//! ```
//!
//! Everything a world makes (namespaces, cgroups, directories, processes) belongs to a value and goes with it. What a
//! killed test leaves behind carries its owner's pid in its name; [`sweep::sweep`] removes it. Nothing here touches
//! the root network namespace or the root cgroup.

pub mod access;
pub mod authority;
pub mod catalog;
pub mod cgroup;
pub mod cluster;
pub mod daemon;
pub mod host;
mod ip;
pub mod joined;
pub mod kernel;
pub mod namespace;
pub mod observe;
mod owner;
pub mod policy;
pub mod program;
pub mod report;
pub mod scrape;
pub mod service;
pub mod sweep;
pub mod topology;
pub mod traffic;
pub mod wait;
pub mod world;
