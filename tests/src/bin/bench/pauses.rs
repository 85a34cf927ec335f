//! What the machine itself takes from everyone: a virtual processor's host and its kernel's own threads stop it for
//! moments, which no counter of the guest shows. Latencies below are not to be had by anyone.

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;
use std::time::{Duration, Instant};

/// How long is looked.
const LOOK: Duration = Duration::from_secs(1);
/// What is shorter is an interrupt.
const SHORTEST: Duration = Duration::from_micros(200);

/// Pauses of the processor that had most of them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Pauses {
    /// Milliseconds of each second that were lost.
    pub(crate) lost_ms: f64,
    pub(crate) longest_ms: f64,
}

/// Looks at the clock on every processor for a while, and does nothing else.
pub(crate) fn look() -> Result<Pauses> {
    let allowed = sched_getaffinity(None).context("cannot read which processors are allowed")?;
    let processors = (0..CpuSet::MAX_CPU).filter(|processor| allowed.is_set(*processor));
    let looking: Vec<_> = processors.map(|processor| std::thread::spawn(move || look_on(processor))).collect();
    let mut worst = Pauses::default();
    for looking in looking {
        let pauses = looking.join().map_err(|_| anyhow::anyhow!("looking at the clock failed"))??;
        if pauses.lost_ms >= worst.lost_ms {
            worst = pauses;
        }
    }
    Ok(worst)
}

fn look_on(processor: usize) -> Result<Pauses> {
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only).with_context(|| format!("cannot run on processor {processor}"))?;
    let (start, mut pauses) = (Instant::now(), Pauses::default());
    let mut last = start;
    while last.duration_since(start) < LOOK {
        let now = Instant::now();
        pauses.add(now.duration_since(last));
        last = now;
    }
    Ok(pauses)
}

impl Pauses {
    /// Counts what was between two looks at the clock.
    fn add(&mut self, between: Duration) {
        if between >= SHORTEST {
            let ms = between.as_secs_f64() * 1e3;
            self.lost_ms += ms / LOOK.as_secs_f64();
            self.longest_ms = self.longest_ms.max(ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_no_pauses() {
        let mut pauses = Pauses::default();
        [50, 3_000, 199, 1_000].into_iter().for_each(|micros| pauses.add(Duration::from_micros(micros)));
        assert_eq!((pauses.lost_ms, pauses.longest_ms), (4.0, 3.0));
    }
}
