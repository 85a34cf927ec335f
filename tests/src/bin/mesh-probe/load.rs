//! Requests and responses against an echo server, and how long they take.

use crate::server::errno;
use clap::Args;
use mesh_tests::report::Load;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    destination: SocketAddr,
    /// How many requests in all.
    #[arg(long, default_value_t = 1_000)]
    requests: u64,
    /// How many connections share them.
    #[arg(long, default_value_t = 8)]
    connections: u64,
    /// Bytes of a request, and of its response.
    #[arg(long, default_value_t = 128)]
    size: usize,
    /// The text that requests are made of.
    #[arg(long, default_value = "nodemesh probe ")]
    message: String,
    /// Stop after this long even if requests are left.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// What one connection did.
#[derive(Default)]
struct Part {
    micros: Vec<u64>,
    connected: bool,
    error: Option<io::Error>,
}

/// Runs the load; successful if every request was answered right.
pub(crate) fn run(options: &Options) -> (bool, String) {
    let started = Instant::now();
    let parts = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map(|runtime| runtime.block_on(all(options)));
    let mut load = Load::default();
    let mut micros = Vec::new();
    for part in parts.unwrap_or_else(|error| vec![Part { error: Some(error), ..Part::default() }]) {
        load.connections += u64::from(part.connected);
        micros.extend(part.micros);
        if let Some(error) = part.error {
            *load.errors.entry(errno(&error)).or_default() += 1;
        }
    }
    micros.sort_unstable();
    load.requests = micros.len() as u64;
    load.failed = options.requests - load.requests;
    load.bytes_sent = load.requests * options.size as u64;
    load.bytes_received = load.bytes_sent;
    load.micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    (load.p50_micros, load.p90_micros) = (percentile(&micros, 50), percentile(&micros, 90));
    (load.p99_micros, load.max_micros) = (percentile(&micros, 99), percentile(&micros, 100));
    (load.failed == 0, serde_json::to_string(&load).expect("a report is plain data"))
}

async fn all(options: &Options) -> Vec<Part> {
    let left = Arc::new(AtomicU64::new(options.requests));
    let deadline = Instant::now() + Duration::from_secs(options.seconds);
    let tasks: Vec<_> = (0..options.connections)
        .map(|_| tokio::spawn(connection(options.clone(), Arc::clone(&left), deadline)))
        .collect();
    let mut parts = Vec::new();
    for task in tasks {
        parts.push(task.await.unwrap_or_else(|error| Part { error: Some(error.into()), ..Part::default() }));
    }
    parts
}

async fn connection(options: Options, left: Arc<AtomicU64>, deadline: Instant) -> Part {
    let mut part = Part::default();
    if let Err(error) = tokio::time::timeout_at(deadline.into(), requests(&options, &left, &mut part))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    {
        part.error = Some(error);
    }
    part
}

async fn requests(options: &Options, left: &AtomicU64, part: &mut Part) -> io::Result<()> {
    let mut stream = TcpStream::connect(options.destination).await?;
    stream.set_nodelay(true)?;
    part.connected = true;
    let request: Vec<u8> = options.message.bytes().cycle().take(options.size).collect();
    let mut response = vec![0; options.size];
    let take_one =
        |left: &AtomicU64| left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
    while take_one(left) {
        let started = Instant::now();
        stream.write_all(&request).await?;
        stream.read_exact(&mut response).await?;
        part.micros.push(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX));
        if response != request {
            return Err(io::Error::other("the response differs from the request"));
        }
    }
    Ok(())
}

/// Nearest rank; 0 if nothing was measured.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let sorted: Vec<u64> = (1..=200).collect();
        assert_eq!([50, 90, 99, 100].map(|percent| percentile(&sorted, percent)), [100, 180, 198, 200]);
        assert_eq!(percentile(&[7], 50), 7);
        assert_eq!(percentile(&[], 99), 0);
    }
}
