//! The process families that every tool knows (`process_*`), read from /proc at each scrape.

use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Debug)]
pub(super) struct Collector {
    /// Read once: the difference of two clocks would waver from scrape to scrape.
    start_time: Option<f64>,
}

impl Collector {
    pub(super) fn new() -> Self {
        Self { start_time: start_time() }
    }
}

impl prometheus_client::collector::Collector for Collector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let seconds = Some(&Unit::Seconds);
        let mut cpu =
            encoder.encode_descriptor("process_cpu", "Processor time that was used.", seconds, MetricType::Counter)?;
        cpu.encode_counter::<NoLabelSet, _, f64>(&cpu_seconds(), None)?;
        let gauges = [
            ("process_resident_memory", "Resident memory.", Some(Unit::Bytes), status_field("VmRSS:", 1024)),
            ("process_virtual_memory", "Virtual memory.", Some(Unit::Bytes), status_field("VmSize:", 1024)),
            ("process_threads", "Threads.", None, status_field("Threads:", 1)),
            ("process_open_fds", "Open file descriptors.", None, open_fds()),
            ("process_max_fds", "The limit of open file descriptors.", None, Some(max_fds())),
            ("process_start_time", "When it started, in Unix time.", Some(Unit::Seconds), self.start_time),
        ];
        for (name, help, unit, value) in gauges {
            // What cannot be read is left out: no value is better than a wrong one.
            let Some(value) = value else { continue };
            encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?.encode_gauge(&value)?;
        }
        Ok(())
    }
}

fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// A number of /proc/self/status, times `unit`.
fn status_field(name: &str, unit: u64) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some((number * unit) as f64)
}

fn open_fds() -> Option<f64> {
    let entries = std::fs::read_dir("/proc/self/fd").ok()?.count();
    // Without the one that reads the directory.
    Some(entries.saturating_sub(1) as f64)
}

fn max_fds() -> f64 {
    getrlimit(Resource::Nofile).current.map_or(f64::INFINITY, |limit| limit as f64)
}

fn start_time() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in parentheses and may hold anything; starttime is the 22nd.
    let ticks: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    // Linux reports times to user space in units of 1/100 s on every architecture (USER_HZ).
    let after_boot = ticks / 100.0;
    let since_boot = clock_gettime(ClockId::Boottime);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    let boot = now - (since_boot.tv_sec as f64 + since_boot.tv_nsec as f64 / 1e9);
    Some(boot + after_boot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_describes_itself() {
        assert!(cpu_seconds() > 0.0);
        assert!(status_field("VmRSS:", 1024).unwrap() > 1024.0 * 1024.0);
        assert!(status_field("Threads:", 1).unwrap() >= 1.0);
        let before = open_fds().unwrap();
        // Other tests open and close files at the same time, far fewer than these.
        let held: Vec<_> = (0..200).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        assert!(open_fds().unwrap() > before, "{} more files are open than before", held.len());
        assert!(max_fds() >= before);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - start_time().unwrap();
        assert!((-1.0..86_400.0).contains(&age), "this test began {age} s ago");
    }
}
