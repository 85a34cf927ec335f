//! Processor time and memory: of control groups, and of everything that does not belong to the benchmark.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Foreign load of more than this many cores disturbs a measure.
const DISTURBING: f64 = 0.16;
/// `PF_KTHREAD` of `linux/sched.h`, in the flags of `/proc/<pid>/stat`.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Processor time that a control group's processes, ended ones included, have taken.
pub(crate) fn of_group(group: &Path) -> Result<Duration> {
    let path = group.join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let used = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("cpu.stat has no usage_usec")?;
    Ok(Duration::from_micros(used.parse()?))
}

/// Resident memory of a control group's processes in KiB; what they share is counted once.
pub(crate) fn resident(group: &Path) -> Result<u64> {
    let path = group.join("cgroup.procs");
    let processes = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    processes.lines().map(proportional).sum()
}

fn proportional(pid: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("a process has gone")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("smaps_rollup has no Pss")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Looks at how much processes outside of some control groups take meanwhile.
pub(crate) struct Watch {
    own: Vec<PathBuf>,
    since: Instant,
    ticks: u64,
}

impl Watch {
    pub(crate) fn start(own: &[PathBuf]) -> Self {
        Self { own: own.to_vec(), since: Instant::now(), ticks: foreign_ticks(own) }
    }

    /// Cores that others took, if that is too many.
    pub(crate) fn disturbed(&self) -> Option<f64> {
        let ticks = foreign_ticks(&self.own).saturating_sub(self.ticks) as f64;
        let cores = ticks / rustix::param::clock_ticks_per_second() as f64 / self.since.elapsed().as_secs_f64();
        (cores > DISTURBING).then_some(cores)
    }
}

/// Ticks of all processes of the machine but this one, kernel threads and those of the groups; children that have ended
/// count with their parents.
fn foreign_ticks(own: &[PathBuf]) -> u64 {
    let names: Vec<_> = own.iter().filter_map(|group| group.file_name()?.to_str()).collect();
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let foreign = pids.filter(|pid| *pid != std::process::id()).filter_map(|pid| {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        if names.iter().any(|name| groups.contains(name)) {
            return None;
        }
        ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    });
    foreign.sum()
}

/// `utime`, `stime`, `cutime` and `cstime` of a line of `/proc/<pid>/stat`; `None` for a kernel thread.
fn ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let flags: u64 = fields.get(6)?.parse().ok()?;
    let times = fields.get(11..15)?.iter().map(|ticks| ticks.parse::<u64>().ok());
    if flags & KERNEL_THREAD != 0 { None } else { times.sum() }
}

#[cfg(test)]
mod tests {
    use super::ticks;

    #[test]
    fn ticks_are_read_behind_any_name() {
        let user = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0";
        assert_eq!(ticks(user), Some(100));
        assert_eq!(ticks(&user.replace("4194560", "2129984")), None);
    }
}
