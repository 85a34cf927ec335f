//! A sender whose reader is asleep.

use crate::ConnectOptions;
use crate::connect::Way;
use crate::exchange::{READ_BUFFER, open, receive};
use crate::pattern::{Hash, Pattern};
use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::report::Call;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Write};
use std::net::Shutdown;
use std::time::Duration;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    connect: ConnectOptions,
    /// Give up after this many bytes.
    #[arg(long)]
    limit: u64,
    /// How long no byte may be taken before the connection counts as stalled.
    #[arg(long, default_value_t = 1_000)]
    quiet_millis: u64,
    /// The server reads this many bytes before it falls asleep: stalls before that do not count.
    #[arg(long, default_value_t = 0)]
    after: u64,
    /// Once stalled, say so on stderr, go on to this many bytes in all when the server wakes, and expect their hash.
    #[arg(long)]
    resume: Option<u64>,
}

/// Writes to a server that does not read (`hold`) until no byte is taken for a while.
pub(crate) fn stall(options: &Options, call: &mut Call) -> Result<()> {
    let mut stream = open(Way::Blocking, &options.connect, call)?;
    stream.set_nonblocking(true)?;
    let (mut pattern, mut hash) = (Pattern::new(rand::random()), Hash::new());
    let mut block = vec![0; READ_BUFFER];
    pattern.fill(&mut block);
    let quiet = Timespec::try_from(Duration::from_millis(options.quiet_millis))?;
    let mut taken = 0;
    loop {
        ensure!(call.bytes_sent < options.limit, "{} bytes were taken by nobody", options.limit);
        match stream.write(&block[taken..]) {
            Ok(count) => {
                hash.update(&block[taken..taken + count]);
                taken += count;
                call.bytes_sent += count as u64;
                if taken == block.len() {
                    pattern.fill(&mut block);
                    taken = 0;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let is_quiet = poll(&mut [PollFd::new(&stream, PollFlags::OUT)], Some(&quiet))? == 0;
                if is_quiet && call.bytes_sent > options.after {
                    break;
                }
            }
            Err(error) => return Err(error).context("write"),
        }
    }
    let Some(total) = options.resume else { return Ok(()) };
    eprintln!("stalled {}", call.bytes_sent);
    stream.set_nonblocking(false)?;
    // What the test does meanwhile takes its time: a stalled connection may wait as long as it likes.
    stream.set_write_timeout(None)?;
    while call.bytes_sent < total {
        let rest = usize::try_from(total - call.bytes_sent).unwrap_or(usize::MAX);
        let part = &block[taken..block.len().min(taken.saturating_add(rest))];
        stream.write_all(part).context("write after the stall")?;
        hash.update(part);
        call.bytes_sent += part.len() as u64;
        pattern.fill(&mut block);
        taken = 0;
    }
    stream.shutdown(Shutdown::Write)?;
    let answer = receive(&mut stream).context("the server's hash")?;
    (call.sent_hash, call.received_hash) = (hash.hex(), String::from_utf8(answer.last)?);
    ensure!(call.sent_hash == call.received_hash, "the hashes differ");
    Ok(())
}
