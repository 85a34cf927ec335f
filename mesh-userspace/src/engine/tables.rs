//! Desired state, and the pure way from one desired state to another.

use super::{SharedMap, Snapshot};
use crate::model::{Workload, WorkloadUid};
use mesh_common::addr::Endpoint;
use mesh_common::policy::source::EVERYONE;
use mesh_common::policy::{Matched, VerdictKey};
use mesh_common::service::{
    AppPort, AppPortKey, Backend, CidrAction, CidrKey, DatagramFrontend, Frontend, FrontendKey, RangeKey,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Everything this node should hold: kernel maps, local workloads, the proxy's snapshot. Cloning is cheap and shares
/// all contents: keep the clone of before an update to [`diff`] against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    pub frontends: SharedMap<FrontendKey, Frontend>,
    /// What the kernel itself may pick: the endpoints on this node, in slots from 1 on.
    pub backends: SharedMap<FrontendKey, Backend>,
    /// Key: prefix length within 128 bits (IPv4: 96 + n), and the network address.
    pub cidrs: SharedMap<(u32, CidrKey), CidrAction>,
    pub app_ports: SharedMap<AppPortKey, AppPort>,
    /// UDP frontends, by address and port.
    pub datagrams: SharedMap<Endpoint, DatagramFrontend>,
    pub verdicts: SharedMap<VerdictKey, Matched>,
    /// Key: prefix length within 160 bits (IPv4: 128 + n), the group's number and the network address.
    pub ranges: SharedMap<(u32, RangeKey), u32>,
    /// What a connect() that policy denies fails with; 0 while no `MeshConfig` says.
    pub denied_errno: u32,
    /// This node's meshed workloads that name their network namespace.
    pub local: Arc<BTreeMap<WorkloadUid, Arc<Workload>>>,
    pub snapshot: Arc<Snapshot>,
}

/// One change to one entry of a kernel map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MapOp {
    SetRange(u32, RangeKey, u32),
    SetVerdict(VerdictKey, Matched),
    SetDeniedErrno(u32),
    SetAppPort(AppPortKey, AppPort),
    SetCidr(u32, CidrKey, CidrAction),
    SetBackend(FrontendKey, Backend),
    SetFrontend(FrontendKey, Frontend),
    SetDatagram(Endpoint, DatagramFrontend),
    RemoveDatagram(Endpoint),
    RemoveFrontend(FrontendKey),
    RemoveBackend(FrontendKey),
    RemoveCidr(u32, CidrKey),
    RemoveAppPort(AppPortKey),
    RemoveVerdict(VerdictKey),
    RemoveRange(u32, RangeKey),
}

/// Whether this is a policy group's header, which is written after and removed before all else of the group.
pub(crate) fn is_group_header(key: &VerdictKey) -> bool {
    key.source() == EVERYONE && key.port_be() == 0
}

/// The operations that lead from the maps of `old` to those of `new`, in an order that is safe to stop after any of
/// them: a workload's guard exists before its address is captured and outlives it; an address that changes from
/// frontend to workload or back is captured all the while; a frontend's header never counts backends whose slots are
/// not there; a policy group is there as a whole before anything refers to it, and as long as something does. Groups
/// are never rewritten, for their number stands for their contents: both the old and the new one are in the tables
/// until everything refers to the new one.
#[must_use]
pub fn diff(old: &Tables, new: &Tables) -> Vec<MapOp> {
    let (app_ports_set, app_ports_removed) = new.app_ports.changes_since(&old.app_ports);
    let (cidrs_set, cidrs_removed) = new.cidrs.changes_since(&old.cidrs);
    let (frontends_set, frontends_removed) = new.frontends.changes_since(&old.frontends);
    let (backends_set, backends_removed) = new.backends.changes_since(&old.backends);
    let (datagrams_set, datagrams_removed) = new.datagrams.changes_since(&old.datagrams);
    let (mut verdicts_set, mut verdicts_removed) = new.verdicts.changes_since(&old.verdicts);
    let (ranges_set, ranges_removed) = new.ranges.changes_since(&old.ranges);
    verdicts_set.sort_by_key(|(key, _)| is_group_header(key));
    verdicts_removed.sort_by_key(|key| !is_group_header(key));

    let mut ops = Vec::new();
    ops.extend(ranges_set.into_iter().map(|((length, key), class)| MapOp::SetRange(*length, *key, *class)));
    ops.extend(verdicts_set.into_iter().map(|(key, value)| MapOp::SetVerdict(*key, *value)));
    ops.extend((old.denied_errno != new.denied_errno).then_some(MapOp::SetDeniedErrno(new.denied_errno)));
    ops.extend(app_ports_set.into_iter().map(|(key, value)| MapOp::SetAppPort(*key, *value)));
    ops.extend(cidrs_set.into_iter().map(|((length, key), value)| MapOp::SetCidr(*length, *key, *value)));
    ops.extend(backends_set.into_iter().map(|(key, value)| MapOp::SetBackend(*key, *value)));
    ops.extend(frontends_set.into_iter().map(|(key, value)| MapOp::SetFrontend(*key, *value)));
    ops.extend(datagrams_set.into_iter().map(|(key, value)| MapOp::SetDatagram(*key, *value)));
    ops.extend(datagrams_removed.into_iter().map(|key| MapOp::RemoveDatagram(*key)));
    ops.extend(frontends_removed.into_iter().map(|key| MapOp::RemoveFrontend(*key)));
    ops.extend(backends_removed.into_iter().map(|key| MapOp::RemoveBackend(*key)));
    ops.extend(cidrs_removed.into_iter().map(|(length, key)| MapOp::RemoveCidr(*length, *key)));
    ops.extend(app_ports_removed.into_iter().map(|key| MapOp::RemoveAppPort(*key)));
    ops.extend(verdicts_removed.into_iter().map(|key| MapOp::RemoveVerdict(*key)));
    ops.extend(ranges_removed.into_iter().map(|(length, key)| MapOp::RemoveRange(*length, *key)));
    ops
}
