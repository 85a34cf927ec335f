//! Connections that BBR would pace, by timers that cost more than all the rest of a short path: within a node none is
//! paced, lanes between near nodes are not unless the operator says so, and what is not the mesh's is left as it is.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Place, Program, Running};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;

const PACED: &str = "bbr";
const PORT: u16 = 8080;
/// The daemon's listener in pods, and every node's tunnel.
const OUTBOUND: u16 = 15001;
const TUNNEL: u16 = 15008;

/// n1: pods `client`, `neighbour` and, not in the catalog, `outsider`; host process `web`. n2: pod `server`.
struct Scene {
    cluster: Cluster,
    _held: Vec<Running>,
}

impl Scene {
    fn start(name: &str, congestion: &str) -> Result<Self> {
        let topology = World::named(name).congestion(PACED).node("n1").pods(&["client", "neighbour", "outsider"]);
        let cluster = Cluster::start_with(
            topology.host("web").node("n2").pod("server"),
            |catalog| {
                assert!(catalog.remove("outsider"));
                catalog.workload("web").ports.insert("http".to_owned(), PORT);
                catalog.service("web", 80, "http");
                for name in ["neighbour", "server"] {
                    catalog.service(name, 80, PORT);
                }
            },
            |configuration| configuration["tunnel"]["congestionControl"] = congestion.into(),
        )?;
        let mut held = Vec::new();
        for name in ["neighbour", "server", "web", "outsider"] {
            held.push(cluster.serve(name, PORT, &[])?);
        }
        for name in ["neighbour", "server", "web"] {
            cluster.wait_until_served("client", name)?;
            let service = cluster.catalog.vips(name)[0].to_string();
            held.push(hold(&cluster, &service)?);
        }
        held.push(hold(&cluster, &format!("{}:{PORT}", cluster.world.pod("outsider").v4()))?);
        Ok(Self { cluster, _held: held })
    }

    /// The congestion controls of a place's connections from and to a port, once there are any.
    fn algorithms(&self, place: impl Into<Place> + Copy, port: u16) -> Result<Vec<String>> {
        wait::until_ok(&format!("connections of port {port}"), BOUND, || {
            let filter = format!("sport = :{port} or dport = :{port}");
            let listed =
                Program::new("ss").args(["-tinHO", "state", "established", &filter]).run_in(place)?.success()?;
            let algorithms = listed.stdout.lines().map(algorithm).collect::<Result<Vec<_>>>()?;
            ensure!(!algorithms.is_empty(), "there are none");
            Ok(algorithms)
        })
    }

    fn is_paced(&self, place: impl Into<Place> + Copy, port: u16) -> Result<bool> {
        let algorithms = self.algorithms(place, port)?;
        let paced = algorithms.iter().filter(|algorithm| *algorithm == PACED).count();
        ensure!(paced == 0 || paced == algorithms.len(), "port {port}: {algorithms:?}");
        Ok(paced > 0)
    }
}

/// Keeps a connection of the client's.
fn hold(cluster: &Cluster, destination: &str) -> Result<Running> {
    let mut held = Program::probe(["hold", destination]).start_in(cluster.world.pod("client"))?;
    held.wait_for_text("holding")?;
    Ok(held)
}

/// What `ss` says of one connection, of those that it knows.
fn algorithm(line: &str) -> Result<String> {
    let known = ["bbr", "cubic", "reno"];
    let found = line.split_whitespace().find(|word| known.contains(word));
    Ok(found.with_context(|| format!("ss names no congestion control: {line}"))?.to_owned())
}

#[test]
fn nothing_is_paced_within_a_node_nor_between_near_ones() -> Result<()> {
    let scene = Scene::start("unpaced", "auto")?;
    let world = &scene.cluster.world;
    // Both ends of what was captured; of what the kernel carries; of deliveries to a pod and to a process of the node.
    assert!(!scene.is_paced(world.pod("client"), OUTBOUND)?);
    assert!(!scene.is_paced(world.pod("neighbour"), PORT)?);
    assert!(!scene.is_paced(world.pod("server"), PORT)?);
    assert!(!scene.is_paced(world.node("n1"), PORT)?);
    for node in ["n1", "n2"] {
        assert!(!scene.is_paced(world.node(node), TUNNEL)?, "{node}");
    }
    // Not the mesh's. Seen from the client, the kernel's way to the neighbour has the same port.
    assert!(scene.is_paced(world.pod("outsider"), PORT)?);
    let own = scene.algorithms(world.pod("client"), PORT)?;
    assert_eq!(own.iter().filter(|algorithm| *algorithm == PACED).count(), 1, "{own:?}");
    Ok(())
}

#[test]
fn lanes_are_paced_if_the_operator_wants_what_the_system_does() -> Result<()> {
    let scene = Scene::start("paced", "system")?;
    let world = &scene.cluster.world;
    for node in ["n1", "n2"] {
        assert!(scene.is_paced(world.node(node), TUNNEL)?, "{node}");
    }
    assert!(!scene.is_paced(world.pod("client"), OUTBOUND)?);
    Ok(())
}
