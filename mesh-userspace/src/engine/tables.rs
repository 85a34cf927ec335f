//! Desired state, and the pure way from one desired state to another.

use super::{SharedMap, Snapshot};
use crate::model::{Workload, WorkloadUid};
use mesh_common::service::{AppPort, AppPortKey, CidrAction, CidrKey, Frontend, FrontendKey};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Everything this node should hold: kernel maps, local workloads, the proxy's snapshot. Cloning is cheap and shares
/// all contents: keep the clone of before an update to [`diff`] against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    pub frontends: SharedMap<FrontendKey, Frontend>,
    /// Key: prefix length within 128 bits (IPv4: 96 + n), and the network address.
    pub cidrs: SharedMap<(u32, CidrKey), CidrAction>,
    pub app_ports: SharedMap<AppPortKey, AppPort>,
    /// This node's meshed workloads that name their network namespace.
    pub local: Arc<BTreeMap<WorkloadUid, Arc<Workload>>>,
    pub snapshot: Arc<Snapshot>,
}

/// One change to one entry of a kernel map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MapOp {
    SetAppPort(AppPortKey, AppPort),
    SetCidr(u32, CidrKey, CidrAction),
    SetFrontend(FrontendKey, Frontend),
    RemoveFrontend(FrontendKey),
    RemoveCidr(u32, CidrKey),
    RemoveAppPort(AppPortKey),
}

/// The operations that lead from the maps of `old` to those of `new`, in an order that is safe to stop after any of
/// them: a workload's guard exists before its address is captured and outlives it; an address that changes from
/// frontend to workload or back is captured all the while; a frontend's header never counts backends whose slots are
/// not there.
#[must_use]
pub fn diff(old: &Tables, new: &Tables) -> Vec<MapOp> {
    let (app_ports_set, app_ports_removed) = new.app_ports.changes_since(&old.app_ports);
    let (cidrs_set, cidrs_removed) = new.cidrs.changes_since(&old.cidrs);
    let (mut frontends_set, mut frontends_removed) = new.frontends.changes_since(&old.frontends);
    // Headers (slot 0) go last when a frontend grows. When it shrinks they are rewritten by the sets, which all come
    // before the removals; when it goes as a whole its header goes first.
    frontends_set.sort_by_key(|(key, _)| key.slot() == 0);
    frontends_removed.sort_by_key(|key| key.slot() != 0);

    let mut ops = Vec::new();
    ops.extend(app_ports_set.into_iter().map(|(key, value)| MapOp::SetAppPort(*key, *value)));
    ops.extend(cidrs_set.into_iter().map(|((length, key), value)| MapOp::SetCidr(*length, *key, *value)));
    ops.extend(frontends_set.into_iter().map(|(key, value)| MapOp::SetFrontend(*key, *value)));
    ops.extend(frontends_removed.into_iter().map(|key| MapOp::RemoveFrontend(*key)));
    ops.extend(cidrs_removed.into_iter().map(|(length, key)| MapOp::RemoveCidr(*length, *key)));
    ops.extend(app_ports_removed.into_iter().map(|key| MapOp::RemoveAppPort(*key)));
    ops
}
