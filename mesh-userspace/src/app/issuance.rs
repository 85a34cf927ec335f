//! Certificates from where the configuration says.

use crate::ca::{CaClient, DEFAULT_TIMEOUT};
use crate::config;
use crate::identity::{Identities, Issuer, Orders};
use crate::model::TrustDomain;
use crate::runtime::{Ready, Tasks};
use crate::telemetry::certificates::CertificateMetrics;
use anyhow::{Context as _, Result};
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// What getting certificates from an authority takes.
pub(super) struct Issuance {
    orders: Orders,
    client: Arc<CaClient>,
    metrics: CertificateMetrics,
}

/// Identities, and how those that are wanted come, if not from files.
///
/// # Errors
/// Says which file cannot be used; a node that has not joined is told how to.
pub(super) fn open(
    identity: &config::Identity,
    trust_domain: &TrustDomain,
    registry: &mut Registry,
) -> Result<(Identities, Option<Issuance>)> {
    match identity {
        config::Identity::Files { directory } => Ok((Identities::load(directory, trust_domain)?, None)),
        config::Identity::Authority { directory, addresses } => {
            let client = CaClient::open(directory, addresses.clone(), DEFAULT_TIMEOUT)
                .context("this node cannot ask its certificate authority (identity.ca)")?;
            let (identities, orders) = Identities::issued(directory, trust_domain)?;
            let metrics = CertificateMetrics::register(registry);
            Ok((identities, Some(Issuance { orders, client, metrics })))
        }
    }
}

impl Issuance {
    /// Asks from now on, for as long as the daemon runs.
    pub(super) fn spawn(self, identities: Identities, ready: Ready, tasks: &mut Tasks) {
        let Self { orders, client, metrics } = self;
        let issuer = Issuer::new(identities, orders, client.clone(), metrics, ready);
        tasks.spawn("certificates", issuer.run());
        tasks.spawn("node certificate", async move {
            client.keep_node_certificate().await;
            Ok(())
        });
    }
}
