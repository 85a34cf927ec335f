//! From a configuration to everything bound and loaded.

use super::{App, ca, issuance, limits, reconcile, sources};
use crate::config::Config;
use crate::control::file::FileSource;
use crate::datapath::Datapath;
use crate::engine::FITTED;
use crate::netns::Namespaces;
use crate::proxy::{
    Balancers, Budget, Carried, Context, Datagrams, Edges, EndpointHealth, LocalWorkloads, Registry, Reports,
};
use crate::runtime::{Cores, Polled, Room};
use crate::telemetry::balance::BalanceMetrics;
use crate::telemetry::catalog::CatalogMetrics;
use crate::telemetry::datagrams::DatagramMetrics;
use crate::telemetry::datapath::LeftOut;
use crate::telemetry::dns::DnsMetrics;
use crate::telemetry::flows::FlowMetrics;
use crate::telemetry::live::LiveConnections;
use crate::telemetry::plaintext::PlaintextCallers;
use crate::telemetry::polling;
use crate::telemetry::tunnel::TunnelMetrics;
use crate::telemetry::{Build, Metrics};
use crate::tunnel::Tunnel;
use crate::{admin, dns, proxy, tunnel};
use anyhow::{Context as _, Result, bail};
use arc_swap::ArcSwap;
use std::sync::Arc;
use tokio_util::task::TaskTracker;

impl App {
    /// Reads the catalog and the identities, binds every socket, loads the programs: last, so that whatever else
    /// fails leaves nothing in the kernel.
    ///
    /// # Errors
    /// Says which of these failed and how to mend it.
    pub async fn bind(config: Config, cores: Cores) -> Result<Self> {
        let descriptor_limit = limits::raise_descriptor_limit();
        let mut metrics = Metrics::new(Build { version: env!("CARGO_PKG_VERSION"), abi: mesh_common::ABI_VERSION });
        let admin = admin::Server::bind(&config.admin)?;
        let catalog_metrics = CatalogMetrics::register(metrics.registry());
        let (mut updates, catalog) = FileSource::spawn(&config.catalog, catalog_metrics)?;
        let first = reconcile::first_snapshot(&mut updates).await?;
        let Some(mesh) = first.mesh.clone() else {
            bail!(
                "{}: no valid MeshConfig, so the trust domain is unknown; `nodemesh validate {}` says more",
                config.catalog.display(),
                config.catalog.display()
            )
        };
        let snapshot = Arc::new(ArcSwap::default());
        // Before the identities: an authority in this process makes the node's own certificate.
        let authority = ca::Hosted::inside(&config, &mut metrics, &snapshot)?;
        let (identities, issuance) = issuance::open(&config.identity, &mesh.trust_domain, metrics.registry())?;
        metrics.tls(sources::offered_tls(&identities));
        let tunnel_metrics = Arc::new(TunnelMetrics::register(metrics.registry()));
        let names = dns::Server::new(snapshot.clone(), DnsMetrics::register(metrics.registry()));
        let mut bounds = limits::Sources::default();
        bounds.add(admin.levels());
        if let Some(authority) = &authority {
            bounds.add(authority.levels());
        }
        bounds.add(names.levels());
        let descriptors = limits::descriptors(descriptor_limit, bounds.capacity());
        let accepts = metrics.accepts().clone();
        let tunnel = tunnel::Server::bind(
            config.tunnel.clone(),
            identities.clone(),
            tunnel_metrics.clone(),
            descriptors.clone(),
            accepts.clone(),
            cores.clone(),
        )
        .context("cannot bind the tunnel's addresses (tunnel.listen)")?;
        let (balancers, health) = (Balancers::default(), EndpointHealth::default());
        let sums = sources::balance(balancers.clone(), health.clone());
        bounds.add(tunnel.levels());
        let context = Arc::new(Context {
            node: config.node.clone(),
            snapshot,
            dns: names,
            locals: LocalWorkloads::default(),
            tunnel: Tunnel::new(
                config.tunnel.clone(),
                identities.clone(),
                tunnel_metrics,
                descriptors.clone(),
                cores.clone(),
            ),
            cores,
            tunnel_port: config.tunnel_port,
            connect_timeout: config.tunnel.connect_timeout,
            metrics: metrics.connections().clone(),
            edges: Edges::default(),
            live: LiveConnections::default(),
            balancers,
            balance: BalanceMetrics::register(metrics.registry(), sums),
            health,
            reports: Reports { metrics: metrics.policy().clone(), plaintext: PlaintextCallers::default() },
            registry: Registry::default(),
            carried: Carried::default(),
            budget: Budget::new(descriptors, config.connections),
            accepts,
            looks: Room::new("socket_looks", proxy::LOOKERS),
            connections: TaskTracker::new(),
        });
        let namespaces = Namespaces::spawn().context("cannot start the thread that enters network namespaces")?;
        let flows = FlowMetrics::register(metrics.registry());
        let datapath = Datapath::load(&config.datapath).context("cannot load the eBPF programs")?;
        let datagrams = Datagrams::new(datapath.aliases(), &DatagramMetrics::register(metrics.registry()));
        bounds.add(datagrams.levels());
        bounds.add(namespaces.levels());
        let shared = context.clone();
        bounds.add(move || shared.levels());
        bounds.show(metrics.registry());
        let cores = context.cores.clone();
        polling::register(metrics.registry(), move || {
            let Polled { time, pauses } = cores.polled();
            (time, pauses)
        });
        sources::register_kernel(&mut metrics, datapath.counters(), &identities);
        let left_out = LeftOut::register(metrics.registry(), &FITTED);
        Ok(Self {
            config,
            context,
            metrics,
            identities,
            issuance,
            catalog,
            first,
            updates,
            tunnel,
            admin,
            namespaces,
            flows,
            datagrams,
            datapath,
            left_out,
            authority,
        })
    }
}
