//! Many short connections, one after the other or in batches that other programs share.

use crate::ConnectOptions;
use crate::pattern::Pattern;
use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::report::{Call, Greeting};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, UnixStream};
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

#[derive(Clone, Debug, Args)]
pub(crate) struct ManyOptions {
    #[command(flatten)]
    connect: ConnectOptions,
    /// How many connections in all.
    #[arg(long)]
    count: u32,
    /// How many at the same time.
    #[arg(long, default_value_t = 256)]
    concurrency: usize,
    /// Open `--concurrency` connections, hold them, write a byte to this unix socket and wait for one; then use and
    /// close them and open the next ones. Whoever listens there brings several of these programs together.
    #[arg(long)]
    meeting: Option<PathBuf>,
}

/// Many connections, each with a message of its own and random length. With `--source`, connection i binds port + i.
pub(crate) fn many(options: &ManyOptions, call: &mut Call) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcomes = runtime.block_on(async {
        match &options.meeting {
            Some(meeting) => in_batches(options, UnixStream::connect(meeting).await.context("the meeting")?).await,
            None => as_permitted(options).await,
        }
    })?;
    let mut first_error = None;
    for outcome in outcomes {
        match outcome {
            Ok(short) => {
                call.connections += 1;
                call.bytes_sent += short.bytes;
                call.bytes_received += short.bytes;
                if let Some(greeting) = short.greeting {
                    let peer: SocketAddr = greeting.peer.parse()?;
                    *call.peers.entry(peer.ip().to_string()).or_default() += 1;
                    *call.servers.entry(greeting.server).or_default() += 1;
                }
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    let lost = u64::from(options.count) - call.connections;
    first_error.map_or(Ok(()), |error| Err(error.context(format!("{lost} of {} were lost", options.count))))
}

/// Each connection begins as soon as another one has ended.
async fn as_permitted(options: &ManyOptions) -> Result<Vec<Result<Short>>> {
    let permits = Arc::new(Semaphore::new(options.concurrency));
    let mut tasks = JoinSet::new();
    for number in 0..options.count {
        let permit = Arc::clone(&permits).acquire_owned().await?;
        let connect = options.connect.clone();
        tasks.spawn(async move {
            let _permit = permit;
            timeout(connect.timeout(), short(&connect, number, None)).await.context("timeout")?
        });
    }
    Ok(tasks.join_all().await)
}

/// All connections of a batch are open when the first one of them is used.
async fn in_batches(options: &ManyOptions, mut meeting: UnixStream) -> Result<Vec<Result<Short>>> {
    let mut outcomes = Vec::new();
    let mut next = 0;
    while next < options.count {
        let end = options.count.min(next + u32::try_from(options.concurrency)?);
        let all_and_this = Arc::new(Barrier::new(usize::try_from(end - next)? + 1));
        let mut tasks = JoinSet::new();
        for number in next..end {
            let (connect, barrier) = (options.connect.clone(), Arc::clone(&all_and_this));
            tasks.spawn(async move {
                timeout(connect.timeout(), short(&connect, number, Some(&barrier))).await.context("timeout")?
            });
        }
        let met = timeout(options.connect.timeout(), async {
            all_and_this.wait().await;
            meeting.write_all(&[0]).await?;
            meeting.read_u8().await?;
            all_and_this.wait().await;
            anyhow::Ok(())
        });
        let met = met.await.context("not all connections of a batch were opened in time").flatten();
        outcomes.extend(tasks.join_all().await);
        if let Err(error) = met {
            // Why a connection failed says more.
            outcomes.push(Err(error));
            return Ok(outcomes);
        }
        next = end;
    }
    Ok(outcomes)
}

struct Short {
    bytes: u64,
    greeting: Option<Greeting>,
}

/// One connection; once it is open it passes the barrier twice, if there is one.
async fn short(options: &ConnectOptions, number: u32, batch: Option<&Barrier>) -> Result<Short> {
    let socket = if options.destination.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(mut source) = options.source {
        let port = u32::from(source.port()) + number;
        source.set_port(u16::try_from(port).context("--source has too few ports above it for --count")?);
        socket.set_reuseaddr(true)?;
        socket.bind(source).context("bind")?;
    }
    let stream = socket.connect(options.destination).await.context("connect")?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let greeting = if options.greet {
        let mut line = String::new();
        stream.read_line(&mut line).await.context("the greeting")?;
        Some(serde_json::from_str(&line).context("the greeting")?)
    } else {
        None
    };
    if let Some(batch) = batch {
        batch.wait().await;
        batch.wait().await;
    }
    let mut message = vec![0; 1 + usize::try_from(Pattern::new(number.into()).number() % 4_000)?];
    Pattern::new(u64::from(number) << 32).fill(&mut message);
    stream.write_all(&message).await.context("write")?;
    stream.shutdown().await.context("shutdown")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.context("read")?;
    ensure!(answer == message, "the answer differs from the message");
    Ok(Short { bytes: message.len() as u64, greeting })
}
