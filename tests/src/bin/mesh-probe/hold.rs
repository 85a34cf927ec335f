//! Connections that stay open until the end of input.

use crate::ConnectOptions;
use crate::pattern::Pattern;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mesh_tests::report::{Call, Greeting};
use std::io::Read;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

/// Longest message of a round.
const LONGEST: u64 = 8_000;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    connect: ConnectOptions,
    /// How many connections.
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Exchange messages all the time, instead of one at the start and one at the end.
    #[arg(long)]
    chatter: bool,
    /// Send nothing before the end of input.
    #[arg(long, conflicts_with = "chatter")]
    silent: bool,
}

/// Opens connections to an echo server, exchanges a message on each (none if silent), says `holding` on stderr, and at the end of input
/// exchanges another one and finishes. A connection that ends or errs before, or a byte that differs, is a failure.
pub(crate) fn hold(options: &Options, call: &mut Call) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (end, ended) = watch::channel(false);
        std::thread::spawn(move || {
            // An input that cannot be read has ended.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            let _ = end.send(true);
        });
        let (up, mut ups) = mpsc::unbounded_channel();
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..options.count {
            let held = Held { options: options.clone(), number, up: up.clone(), ended: ended.clone() };
            tasks.spawn(held.run());
        }
        drop(up);
        let mut open = 0;
        while open < options.count && ups.recv().await.is_some() {
            open += 1;
        }
        if open == options.count {
            eprintln!("holding {open}");
        }
        let mut first_error = None;
        while let Some(outcome) = tasks.join_next().await {
            match outcome? {
                Ok((bytes, greeting)) => {
                    call.connections += 1;
                    call.bytes_sent += bytes;
                    call.bytes_received += bytes;
                    if let Some(greeting) = greeting {
                        *call.servers.entry(greeting.server).or_default() += 1;
                    }
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        let lost = u64::from(options.count) - call.connections;
        first_error.map_or(Ok(()), |error| Err(error.context(format!("{lost} of {} broke", options.count))))
    })
}

struct Held {
    options: Options,
    number: u32,
    up: mpsc::UnboundedSender<()>,
    ended: watch::Receiver<bool>,
}

impl Held {
    async fn run(mut self) -> Result<(u64, Option<Greeting>)> {
        let timeout = self.options.connect.timeout();
        let mut line = Line::open(&self.options.connect, self.number, timeout).await?;
        if !self.options.silent {
            line.round().await?;
        }
        // Nobody counts any more if another connection has failed.
        let _ = self.up.send(());
        while !*self.ended.borrow() {
            if self.options.chatter {
                line.round().await?;
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                _ = self.ended.changed() => {}
                read = line.stream.read_u8() => bail!("the idle connection {} ended: {read:?}", self.number),
            }
        }
        line.round().await?;
        line.stream.shutdown().await.context("shutdown")?;
        let mut rest = Vec::new();
        let read = line.stream.read_to_end(&mut rest);
        tokio::time::timeout(timeout, read).await.context("the server's end")?.context("the server's end")?;
        ensure!(rest.is_empty(), "{} bytes followed the last message", rest.len());
        Ok((line.bytes, line.greeting))
    }
}

struct Line {
    stream: BufReader<TcpStream>,
    pattern: Pattern,
    bytes: u64,
    greeting: Option<Greeting>,
    timeout: Duration,
}

impl Line {
    async fn open(options: &ConnectOptions, number: u32, timeout: Duration) -> Result<Self> {
        let stream =
            tokio::time::timeout(timeout, TcpStream::connect(options.destination)).await?.context("connect")?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        let greeting = if options.greet {
            let mut line = String::new();
            tokio::time::timeout(timeout, stream.read_line(&mut line)).await?.context("the greeting")?;
            Some(serde_json::from_str(&line).context("the greeting")?)
        } else {
            None
        };
        Ok(Self { stream, pattern: Pattern::new(u64::from(number) << 32 | 1), bytes: 0, greeting, timeout })
    }

    async fn round(&mut self) -> Result<()> {
        let mut message = vec![0; 1 + usize::try_from(self.pattern.number() % LONGEST)?];
        self.pattern.fill(&mut message);
        let mut answer = vec![0; message.len()];
        let exchange = async {
            self.stream.write_all(&message).await.context("write")?;
            self.stream.read_exact(&mut answer).await.context("read")?;
            anyhow::Ok(())
        };
        let at = self.bytes;
        tokio::time::timeout(self.timeout, exchange)
            .await
            .with_context(|| format!("no answer after {at} bytes"))?
            .with_context(|| format!("after {at} bytes"))?;
        ensure!(answer == message, "the answer differs from the message after {at} bytes");
        self.bytes += message.len() as u64;
        Ok(())
    }
}
