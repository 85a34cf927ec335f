//! What a run gave: how many, and how long they took.

use anyhow::Result;
use hdrhistogram::Histogram;
use mesh_tests::report::Requests;
use std::time::{Duration, Instant};

/// Times above this count as this: a minute, in nanoseconds.
const HIGHEST: u64 = 60_000_000_000;
/// Significant digits.
const DIGITS: u8 = 3;

pub(crate) struct Measure {
    started: Instant,
    nanos: Histogram<u64>,
    failed: u64,
}

impl Measure {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self { started: Instant::now(), nanos: Histogram::new_with_bounds(1, HIGHEST, DIGITS)?, failed: 0 })
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    pub(crate) fn answered(&mut self, after: Duration) {
        self.nanos.saturating_record(u64::try_from(after.as_nanos()).unwrap_or(HIGHEST));
    }

    pub(crate) fn failed(&mut self) {
        self.failed += 1;
    }

    pub(crate) fn failures(&self) -> u64 {
        self.failed
    }

    /// How many requests were answered.
    pub(crate) fn count(&self) -> u64 {
        self.nanos.len()
    }

    pub(crate) fn report(&self) -> Requests {
        let micros = |quantile| self.nanos.value_at_quantile(quantile) as f64 / 1e3;
        Requests {
            requests: self.count(),
            failed: self.failed,
            seconds: self.started.elapsed().as_secs_f64(),
            p50_micros: micros(0.5),
            p99_micros: micros(0.99),
            p999_micros: micros(0.999),
            max_micros: micros(1.0),
        }
    }
}
