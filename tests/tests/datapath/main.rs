//! The eBPF programs and the daemon's side of them, on a real kernel: who is captured, what is recorded, what is
//! guarded, and what stays when the daemon dies. Needs root.

mod agreement;
mod bed;
mod capture;
mod datagram;
mod guard;
mod host;
mod lifecycle;
mod oracle;
mod run;
mod same_node;
mod scene;
mod verdicts;
