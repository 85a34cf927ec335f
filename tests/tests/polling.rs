//! Threads that wait awake for answers that come soon, unless they are told not to.

use anyhow::Result;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::Program;
use mesh_tests::world::World;

/// Exchanges messages from n1 with a server on n2 until the client's daemon has seen enough of them; what its threads have
/// polled by then.
fn polled(name: &str, share: f64, is_enough: impl Fn(f64, u64) -> bool) -> Result<f64> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
    let cluster = Cluster::start_with(
        topology,
        |catalog| {
            catalog.service("server", 80, 8080);
        },
        |configuration| configuration["limits"]["polling"] = share.into(),
    )?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let mut chatter = Program::probe(["hold", &vip, "--chatter"]).start_in(cluster.world.pod("client"))?;
    chatter.wait_for_text("holding")?;
    let metrics = cluster.wait_for_metrics("n1", "nodemesh_polling", |metrics| {
        let received = metrics.count("nodemesh_tcp_received_bytes_total", &[("reporter", "source")]);
        is_enough(metrics.sum("nodemesh_polling_seconds_total", &[]), received)
    })?;
    drop(chatter);
    Ok(metrics.sum("nodemesh_polling_seconds_total", &[]))
}

#[test]
fn threads_wait_awake_for_answers_that_come_soon() -> Result<()> {
    assert!(polled("awake", 0.5, |polled, _| polled > 0.0)? > 0.0);
    Ok(())
}

#[test]
fn threads_sleep_if_they_may_not_poll() -> Result<()> {
    assert_eq!(polled("asleep", 0.0, |_, received| received > 10_000_000)?.to_bits(), 0.0_f64.to_bits());
    Ok(())
}
