//! New connections all the time.

use crate::ConnectOptions;
use crate::pattern::Pattern;
use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::report::{Churn, Greeting};
use std::io::Read;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};

/// Longest message.
const LONGEST: u64 = 2_000;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    connect: ConnectOptions,
    /// New connections a second; without it, each begins when the last one has ended.
    #[arg(long)]
    rate: Option<u32>,
    /// Stop after so many instead of at the end of input.
    #[arg(long)]
    count: Option<u64>,
    /// Send nothing: the server's greeting is all that passes.
    #[arg(long, requires = "greet")]
    mute: bool,
}

/// Makes connections; successful if none failed.
pub(crate) fn run(options: &Options) -> (bool, String) {
    let mut churn = Churn::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(all(options, &mut churn)),
        Err(error) => fail(&mut churn, &error.into()),
    }
    (churn.failed == 0, serde_json::to_string(&churn).expect("a report is plain data"))
}

fn fail(churn: &mut Churn, error: &anyhow::Error) {
    churn.failed += 1;
    *churn.errors.entry(format!("{error:#}")).or_default() += 1;
}

async fn all(options: &Options, churn: &mut Churn) {
    let (end, mut ended) = watch::channel(false);
    if options.count.is_none() {
        std::thread::spawn(move || {
            // An input that cannot be read has ended.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            let _ = end.send(true);
        });
    }
    let period = Duration::from_secs(1) / options.rate.unwrap_or(1).max(1);
    let mut pace = tokio::time::interval(period);
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut tasks = JoinSet::new();
    let mut number = 0;
    while !*ended.borrow() && options.count.is_none_or(|count| number < count) {
        if options.rate.is_some() {
            tokio::select! {
                _ = pace.tick() => {}
                Ok(()) = ended.changed() => continue,
            }
        }
        tasks.spawn(timed(options.clone(), number));
        number += 1;
        if options.rate.is_none() {
            settle(churn, tasks.join_next().await);
        }
        while let Some(done) = tasks.try_join_next() {
            settle(churn, Some(done));
        }
    }
    while let Some(done) = tasks.join_next().await {
        settle(churn, Some(done));
    }
}

type Done = (Duration, Result<Option<Greeting>>);

fn settle(churn: &mut Churn, done: Option<Result<Done, tokio::task::JoinError>>) {
    match done {
        Some(Ok((elapsed, Ok(greeting)))) => {
            churn.connections += 1;
            churn.slowest_micros = churn.slowest_micros.max(u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX));
            if let Some(greeting) = greeting {
                *churn.servers.entry(greeting.server).or_default() += 1;
            }
        }
        Some(Ok((_, Err(error)))) => fail(churn, &error),
        Some(Err(panic)) => fail(churn, &panic.into()),
        None => {}
    }
}

async fn timed(options: Options, number: u64) -> Done {
    let started = Instant::now();
    let bound = options.connect.timeout();
    let outcome = timeout(bound, one(&options, number)).await.unwrap_or_else(|late| Err(late).context("timeout"));
    (started.elapsed(), outcome)
}

async fn one(options: &Options, number: u64) -> Result<Option<Greeting>> {
    let stream = TcpStream::connect(options.connect.destination).await.context("connect")?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut greeting = None;
    if options.connect.greet {
        let mut line = String::new();
        stream.read_line(&mut line).await.context("the greeting")?;
        greeting = Some(serde_json::from_str(&line).with_context(|| format!("the greeting is {line:?}"))?);
    }
    if options.mute {
        return Ok(greeting);
    }
    let mut message = vec![0; 1 + usize::try_from(Pattern::new(number).number() % LONGEST)?];
    Pattern::new(number << 32 | 1).fill(&mut message);
    stream.write_all(&message).await.context("write")?;
    stream.shutdown().await.context("shutdown")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.context("read")?;
    ensure!(answer == message, "the answer differs from the message");
    Ok(greeting)
}
