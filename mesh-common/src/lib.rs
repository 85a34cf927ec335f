//! The contract between nodemesh's eBPF programs and its daemon: addresses, map keys and values, ring-buffer
//! records, map names, and the one pure [`policy::decide`] that both sides ask.
//!
//! `no_std`, no allocation, no dependency but `core`. The feature `user` adds the conversions to `std` types and the
//! `aya::Pod` markers that the daemon needs.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod abi;
pub mod addr;
pub mod capture;
pub mod datagram;
pub mod event;
pub mod flow;
pub mod host;
pub mod maps;
pub mod outcome;
pub mod policy;
pub mod service;

pub use abi::ABI_VERSION;
pub use addr::{Endpoint, Ip};
