//! What waiting awake takes.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::time::Duration;

type Read = Box<dyn Fn() -> (Duration, u64) + Send + Sync>;

struct AtScrape(Read);

impl fmt::Debug for AtScrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtScrape").finish_non_exhaustive()
    }
}

/// Registers `polling_seconds` and `polling_pauses`; `read` gives both, and is called once a scrape.
pub fn register(registry: &mut Registry, read: impl Fn() -> (Duration, u64) + Send + Sync + 'static) {
    registry.register_collector(Box::new(AtScrape(Box::new(read))));
}

impl Collector for AtScrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (time, pauses) = (self.0)();
        let help = "Time that threads have waited awake for answers, others' turns on their processors included.";
        encoder
            .encode_descriptor("polling", help, Some(&Unit::Seconds), MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, f64>(&time.as_secs_f64(), None)?;
        let help = "Times that waiting awake was given up for a while because others wanted the processor.";
        encoder
            .encode_descriptor("polling_pauses", help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, f64>(&pauses, None)
    }
}
