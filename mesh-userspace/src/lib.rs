//! nodemesh in user space: the node daemon and its CLI.
//!
//! Inputs become [`model::Update`]s; the pure [`engine`] turns them into desired tables; a pure diff turns tables into
//! map operations; one task applies them. The proxy reads a snapshot. Kernel and proxy ask the same
//! [`mesh_common::policy::decide`].
//!
//! Who may import whom (`cargo xtask tidy` checks it), to the left only, siblings in braces never each other:
//! `mesh-common < model < engine, balance < identity < {datapath, netns, control, tunnel, ca,
//! dns} < proxy < admin < config <
//! app < bin`; `runtime` and `telemetry` are leaves that anyone may use and that use nobody; `cli` speaks to the
//! daemon through its socket and uses `model`, `control` (to validate), `admin`'s documents, and `ca`'s client with
//! `identity` (to join: the authority is on another node, and there may be no daemon yet).

pub mod admin;
pub mod app;
pub mod balance;
pub mod ca;
pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
pub mod dns;
pub mod engine;
pub mod identity;
pub mod model;
pub mod netns;
pub mod proxy;
pub mod runtime;
pub mod telemetry;
pub mod tunnel;
