//! The three clients, each over both families: what they did and what they measured.

use crate::scene::{MARKER, Scene};
use anyhow::{Context, Result, ensure};
use mesh_tests::program::Program;
use mesh_tests::report::{Load, served};
use mesh_tests::wait;
use std::net::{IpAddr, SocketAddr};

/// Requests of each client and family; each of curl's is a connection of its own.
const CURL_REQUESTS: usize = 100;
const REDIS_COMMANDS: u32 = 50;
const REDIS_REQUESTS: u32 = 2_000;
const LOAD_REQUESTS: u32 = 4_000;

/// One client's traffic to one virtual address.
#[derive(Debug)]
pub(crate) struct Traffic {
    pub(crate) client: &'static str,
    pub(crate) program: &'static str,
    pub(crate) service: &'static str,
    pub(crate) vip: SocketAddr,
    /// Requests that were answered right.
    pub(crate) requests: u64,
    /// Connections that it made at least.
    pub(crate) connections: u64,
    pub(crate) p50_micros: u64,
    pub(crate) p99_micros: u64,
    /// The client's address, by the server's own account.
    pub(crate) seen: Vec<IpAddr>,
}

/// Runs all clients, one after the other.
pub(crate) fn run(scene: &Scene) -> Result<Vec<Traffic>> {
    let mut traffic = Vec::new();
    for family in [0, 1] {
        let vip = |service: &str| scene.cluster.catalog.vips(service)[family];
        traffic.push(curl(scene, vip("web")).context("curl")?);
        traffic.push(redis(scene, vip("cache")).context("redis-cli")?);
        traffic.push(load(scene, vip("echo")).context("the load client")?);
    }
    Ok(traffic)
}

/// Fetches a page again and again, each time over a new connection.
fn curl(scene: &Scene, vip: SocketAddr) -> Result<Traffic> {
    let before = scene.nginx_clients().map_or(0, |clients| clients.len());
    let output = Program::new("curl")
        .args(["--silent", "--show-error", "--fail", "--max-time", "30", "--output", "/dev/null"])
        .args(["--header", "Connection: close", "--header", &format!("X-Secret: {MARKER}")])
        .args(["--write-out", "%{time_total} %{size_download}\\n", &format!("http://{vip}/?[1-{CURL_REQUESTS}]")])
        .run_in(scene.cluster.world.pod("curl"))?
        .success()?;
    let mut micros = Vec::new();
    for line in output.stdout.lines() {
        let (time, size) = line.split_once(' ').context("curl prints a time and a size")?;
        ensure!(size.parse::<usize>()? > MARKER.len(), "a page of {size} bytes arrived");
        micros.push(micros_of_seconds(time)?);
    }
    micros.sort_unstable();
    let clients = scene.nginx_clients()?.split_off(before);
    Ok(Traffic {
        client: "curl",
        program: "curl",
        service: "web",
        vip,
        requests: micros.len() as u64,
        connections: CURL_REQUESTS as u64,
        p50_micros: percentile(&micros, 50),
        p99_micros: percentile(&micros, 99),
        seen: clients.iter().map(|client| Ok(client.parse()?)).collect::<Result<_>>()?,
    })
}

/// Writes and reads keys with redis-cli; redis-benchmark, of the same package, measures.
fn redis(scene: &Scene, vip: SocketAddr) -> Result<Traffic> {
    let pod = scene.cluster.world.pod("redis-cli");
    let (host, port) = (vip.ip().to_string(), vip.port().to_string());
    let commands: String = (0..REDIS_COMMANDS).map(|n| format!("SET key-{n} {MARKER}-{n}\nGET key-{n}\n")).collect();
    let output = Program::new("redis-cli")
        .args(["-h", &host, "-p", &port])
        .input(format!("{commands}CLIENT INFO\n"))
        .run_in(pod)?
        .success()?;
    let right =
        (0..REDIS_COMMANDS).filter(|n| output.stdout.lines().any(|line| line == format!("{MARKER}-{n}"))).count();
    let addresses = output.stdout.split_ascii_whitespace().filter_map(|word| word.strip_prefix("addr="));
    let seen = addresses.map(|address| Ok(address.parse::<SocketAddr>()?.ip())).collect::<Result<_>>()?;
    let measured = Program::new("redis-benchmark")
        .args(["-h", &host, "-p", &port, "-n", &REDIS_REQUESTS.to_string(), "-c", "4", "-t", "get", "--csv"])
        .run_in(pod)?
        .success()?;
    let (p50_micros, p99_micros) = benchmark_percentiles(&measured.stdout).context("redis-benchmark's table")?;
    Ok(Traffic {
        client: "redis-cli",
        program: "redis-cli",
        service: "cache",
        vip,
        requests: right as u64 + u64::from(REDIS_REQUESTS),
        connections: 5,
        p50_micros,
        p99_micros,
        seen,
    })
}

/// Requests and responses on a few long connections.
fn load(scene: &Scene, vip: SocketAddr) -> Result<Traffic> {
    let before = served(&scene.echo.printed()).len();
    let load: Load = Program::probe(["load", &vip.to_string(), "--requests", &LOAD_REQUESTS.to_string()])
        .args(["--message", MARKER])
        .run_in(scene.cluster.world.pod("load"))?
        .json()?;
    ensure!(load.failed == 0, "{} of {LOAD_REQUESTS} requests failed: {:?}", load.failed, load.errors);
    let seen = wait::until("the echo server has seen every connection", wait::BOUND, || {
        let begun = served(&scene.echo.printed()).split_off(before);
        let begun = begun.into_iter().filter(|served| served.end.is_none());
        let peers: Vec<SocketAddr> = begun.filter_map(|served| served.connection.peer.parse().ok()).collect();
        (peers.len() as u64 >= load.connections).then(|| peers.iter().map(SocketAddr::ip).collect())
    })?;
    Ok(Traffic {
        client: "load",
        program: "load client",
        service: "echo",
        vip,
        requests: load.requests,
        connections: load.connections,
        p50_micros: load.p50_micros,
        p99_micros: load.p99_micros,
        seen,
    })
}

/// `p50_latency_ms` and `p99_latency_ms` of `redis-benchmark --csv`, in microseconds.
fn benchmark_percentiles(csv: &str) -> Option<(u64, u64)> {
    let row = |line: &str| line.split(',').map(|cell| cell.trim_matches('"').to_owned()).collect::<Vec<_>>();
    let mut lines = csv.lines().map(row);
    let (names, values) = (lines.next()?, lines.next()?);
    let value = |name: &str| {
        let column = names.iter().position(|column| column == name)?;
        let millis: f64 = values.get(column)?.parse().ok()?;
        micros_of_seconds(&(millis / 1e3).to_string()).ok()
    };
    Some((value("p50_latency_ms")?, value("p99_latency_ms")?))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time that was measured is not negative")]
fn micros_of_seconds(seconds: &str) -> Result<u64> {
    Ok((seconds.parse::<f64>()? * 1e6).round() as u64)
}

/// Nearest rank.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_read_by_the_column_s_name() {
        let csv = "\"test\",\"rps\",\"p50_latency_ms\",\"p99_latency_ms\"\n\"GET\",\"100.00\",\"0.215\",\"1.503\"\n";
        assert_eq!(benchmark_percentiles(csv), Some((215, 1_503)));
        assert_eq!(benchmark_percentiles("nonsense"), None);
    }
}
