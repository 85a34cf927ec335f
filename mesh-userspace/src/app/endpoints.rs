//! The endpoints of the balancing groups as the admin interface shows them.

use crate::admin::endpoints::EndpointRow;
use crate::balance::EndpointStatus;
use crate::proxy::{BalancerStatus, Context};

pub(super) fn rows(context: &Context) -> Vec<EndpointRow> {
    let groups = context.balancers.statuses();
    groups.iter().flat_map(|group| group.endpoints.iter().map(|endpoint| row(group, endpoint))).collect()
}

fn row(group: &BalancerStatus, status: &EndpointStatus) -> EndpointRow {
    let workload = &status.endpoint.workload;
    let state = match () {
        () if !status.is_healthy => "unhealthy",
        () if status.ejected.is_some() => "ejected",
        () if status.is_on_trial => "trial",
        () if status.is_suspect => "suspect",
        () => "ready",
    };
    let millis = |until: std::time::Instant| {
        u64::try_from(until.saturating_duration_since(group.now).as_millis()).unwrap_or(u64::MAX)
    };
    EndpointRow {
        service: group.service.to_string(),
        frontend: group.frontend.address.to_string(),
        protocol: group.frontend.protocol.as_str().to_owned(),
        workload: workload.name.to_string(),
        address: status.endpoint.address.to_string(),
        node: workload.node.to_string(),
        state: state.to_owned(),
        open: status.open,
        pending: status.pending,
        cause: status.ejected.map(|(_, cause)| cause.reason().to_owned()),
        ejected_millis: status.ejected.map(|(until, _)| millis(until)),
        connect_micros: status.connect_latency.map(|peak| u64::try_from(peak.as_micros()).unwrap_or(u64::MAX)),
    }
}
