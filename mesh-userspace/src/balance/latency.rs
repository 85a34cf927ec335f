//! A moving peak of a latency: a slow answer counts at once, and is forgotten slowly.

use std::time::{Duration, Instant};

/// After so long a peak has lost 63 % of what it was above the others. Long enough that a slow endpoint is not asked
/// again and again, short enough that a recovered one is soon used again.
const MEMORY: Duration = Duration::from_secs(10);
/// How much one more sample counts in a group's average.
const AVERAGE_SHARE: f64 = 1.0 / 32.0;

/// One endpoint's moving peak.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Latency {
    /// In seconds; what it was at the last sample.
    peak: f32,
    sampled_at: Option<Instant>,
}

impl Latency {
    /// A higher sample becomes the peak; a lower one pulls it down, the more the longer the last one is ago.
    pub(super) fn sample(&mut self, sample: Duration, now: Instant) {
        let sample = sample.as_secs_f32();
        self.peak = if sample >= self.peak { sample } else { sample + (self.peak - sample) * self.kept(now) };
        self.sampled_at = Some(now);
    }

    /// What is expected now: the peak, which nears the group's average while nothing is heard. An endpoint that was never
    /// asked is average: neither flooded for want of samples nor starved.
    pub(super) fn expected(&self, average: f32, now: Instant) -> f32 {
        if self.sampled_at.is_none() {
            return average;
        }
        average + (self.peak - average) * self.kept(now)
    }

    pub(super) fn last(&self) -> Option<Duration> {
        self.sampled_at.map(|_| Duration::from_secs_f32(self.peak))
    }

    fn kept(&self, now: Instant) -> f32 {
        let Some(sampled_at) = self.sampled_at else { return 0.0 };
        (-now.saturating_duration_since(sampled_at).as_secs_f32() / MEMORY.as_secs_f32()).exp()
    }
}

/// A group's average over the samples of all its endpoints.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Average(Option<f64>);

impl Average {
    pub(super) fn sample(&mut self, sample: Duration) {
        let sample = sample.as_secs_f64();
        self.0 = Some(self.0.map_or(sample, |average| average + (sample - average) * AVERAGE_SHARE));
    }

    pub(super) fn get(&self) -> Option<Duration> {
        self.0.map(Duration::from_secs_f64)
    }

    /// In seconds; 0 before the first sample.
    pub(super) fn seconds(&self) -> f32 {
        self.0.unwrap_or_default() as f32
    }
}
