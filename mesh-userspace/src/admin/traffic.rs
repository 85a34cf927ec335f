//! Documents about traffic: how each service's connections are spread, and what is done when they fail.

use super::documents::Item;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// A service, the policy that names it if one does, and what holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficRow {
    pub namespace: String,
    pub service: String,
    /// A `TrafficPolicy` of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// `in_force`; `default` without a policy; `overruled` where another policy is in force; `no_service` where the
    /// policy's target is not there.
    pub state: String,
    /// What holds for the service; left out where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<TrafficSettings>,
}

impl Item for TrafficRow {
    const KIND: &'static str = "TrafficList";

    fn order(&self, other: &Self) -> Ordering {
        let key = |row: &Self| (row.namespace.clone(), row.service.clone(), row.policy.clone());
        key(self).cmp(&key(other))
    }
}

/// In the words of `TrafficPolicy`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficSettings {
    pub algorithm: String,
    pub preference: String,
    pub failover_percent: u32,
    pub slow_start_seconds: f64,
    /// With `ClientIP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity_seconds: Option<f64>,
    /// Left out: the daemon's own bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_timeout_seconds: Option<f64>,
    /// Left out: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_seconds: Option<f64>,
    pub retry: RetryRow,
    pub ejection: EjectionRow,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheckRow>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pending: Option<u32>,
    pub same_node: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RetryRow {
    pub attempts: u32,
    pub budget_percent: u32,
    /// Per second.
    pub budget_minimum: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EjectionRow {
    /// 0: never.
    pub consecutive_failures: u32,
    pub base_seconds: f64,
    pub max_seconds: f64,
    pub max_percent: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheckRow {
    /// `tcp`, `http PATH` or `grpc SERVICE`.
    pub probe: String,
    pub interval_seconds: f64,
    pub timeout_seconds: f64,
    pub unhealthy_after: u32,
    pub healthy_after: u32,
}
