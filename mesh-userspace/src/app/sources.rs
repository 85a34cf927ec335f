//! What the admin interface and the scrape show, gathered from the rooms that know it.

use super::reconcile::Report;
use super::{certificates, endpoints, policies};
use crate::admin::documents::{
    CertificateRow, ConfigStatus, ConnectionCounts, DiagnosticRow, EndpointCounts, LaneRow, MapRow, OutcomeRow,
    ServiceRow, Status, WorkloadCounts, WorkloadRow,
};
use crate::admin::{self, Ask};
use crate::balance::{EjectionCause, Exhausted, Levels};
use crate::control::{Diagnostic, Health, Severity};
use crate::datapath::Counters;
use crate::identity::Identities;
use crate::model::{Mode, Protocol, Service, Workload};
use crate::proxy::{Balancers, Context, EndpointHealth};
use crate::runtime::Ready;
use crate::telemetry::balance::Sums;
use crate::telemetry::datapath::{Expiry, Lost, MapSize, OutcomeCount, Sources};
use crate::telemetry::{self, Metrics, Tls};
use crate::tunnel::LaneStatus;
use mesh_common::outcome::Outcome;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// Everything the admin interface reads.
#[derive(Clone)]
pub(super) struct Wiring {
    pub(super) context: Arc<Context>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) identities: Identities,
    pub(super) catalog: watch::Receiver<Health>,
    pub(super) reports: watch::Receiver<Report>,
    pub(super) ready: Ready,
    pub(super) counters: Counters,
    pub(super) started: Instant,
    pub(super) authority: Option<admin::Hosted>,
}

/// Adds the kernel's counters and the certificates' expiry to the scrape.
pub(super) fn register_kernel(metrics: &mut Metrics, counters: Counters, identities: &Identities) {
    let (outcomes, maps, lost) = (counters.clone(), counters.clone(), counters);
    let identities = identities.clone();
    let sources = Sources {
        outcomes: Box::new(move || {
            let counts = outcomes.outcomes().into_iter();
            counts
                .map(|(outcome, count)| OutcomeCount {
                    hook: outcome.hook(),
                    reason: outcome.reason(),
                    verdict: outcome.verdict(),
                    count,
                })
                .collect()
        }),
        maps: Box::new(move || {
            let usage = maps.map_usage().into_iter();
            usage
                .map(|map| MapSize {
                    name: map.name.to_owned(),
                    entries: map.entries,
                    capacity: map.capacity,
                    bytes: map.bytes,
                })
                .collect()
        }),
        lost: Box::new(move || {
            let counts = lost.outcomes().into_iter();
            counts
                .filter_map(|(outcome, count)| match outcome {
                    Outcome::OpenLost => Some(Lost { source: "open_records", count }),
                    Outcome::EventLost => Some(Lost { source: "close_records", count }),
                    Outcome::VerdictLost => Some(Lost { source: "verdict_records", count }),
                    _ => None,
                })
                .collect()
        }),
        certificates: Box::new(move || {
            let certificates = identities.certificates().into_iter();
            certificates
                .map(|certificate| Expiry {
                    identity: certificate.id.to_string(),
                    not_after: certificate.not_after.into(),
                })
                .collect()
        }),
    };
    telemetry::datapath::register(metrics.registry(), sources);
}

/// What the balancing groups and the health checks tell the scrape.
pub(super) fn balance(balancers: Balancers, health: EndpointHealth) -> impl Fn() -> Sums + Send + Sync + 'static {
    move || {
        let (counts, levels) = balancers.sums();
        let sum = |of: fn(&Levels) -> u32| levels.iter().map(|level| u64::from(of(level))).sum::<u64>();
        let (probed, unhealthy) = health.counts();
        let healthy = probed.saturating_sub(unhealthy) as u64;
        Sums {
            ejections: EjectionCause::ALL.map(|cause| (cause.reason(), counts.ejections_by(cause))).to_vec(),
            ejections_withheld: counts.ejections_withheld,
            exhausted: Exhausted::ALL.map(|why| (why.reason(), counts.exhausted_by(why))).to_vec(),
            panics: counts.panics,
            failovers: counts.failovers,
            endpoints: vec![
                ("known", sum(|level| level.endpoints)),
                ("ejected", sum(|level| level.ejected)),
                ("unhealthy", sum(|level| level.unhealthy)),
            ],
            groups: levels.len() as u64,
            open: sum(|level| level.open),
            pending: sum(|level| level.pending),
            probed: vec![("healthy", healthy), ("unhealthy", unhealthy as u64)],
        }
    }
}

/// What this daemon offers in handshakes, in its order of preference.
pub(super) fn offered_tls(identities: &Identities) -> Tls {
    let provider = identities.server_config().crypto_provider().clone();
    let groups: Vec<_> = provider.kx_groups.iter().map(|group| format!("{:?}", group.name())).collect();
    let suites: Vec<_> = provider
        .cipher_suites
        .iter()
        .filter(|suite| suite.tls13().is_some())
        .map(|suite| format!("{:?}", suite.suite()))
        .collect();
    Tls { kx: groups.join(","), suite: suites.join(","), provider: "aws-lc-rs".to_owned(), fips: provider.fips() }
}

impl Wiring {
    pub(super) fn sources(self) -> admin::Sources {
        let metrics = self.metrics.clone();
        let authority = self.authority.clone();
        let wiring = Arc::new(self);
        admin::Sources {
            authority,
            metrics,
            not_ready: wiring.ask(|wiring| wiring.ready.outstanding().into_iter().map(str::to_owned).collect()),
            status: wiring.ask(Self::status),
            workloads: wiring.ask(Self::workloads),
            services: wiring.ask(Self::services),
            connections: {
                let wiring = wiring.clone();
                Arc::new(move |limit| wiring.context.live.snapshot(limit))
            },
            lanes: wiring.ask(|wiring| wiring.context.tunnel.lanes().iter().map(lane).collect()),
            endpoints: wiring.ask(|wiring| endpoints::rows(&wiring.context)),
            certificates: certificates::sources(&wiring.identities),
            policy: policies::sources(&wiring.context),
            diagnostics: wiring.ask(|wiring| wiring.catalog.borrow().diagnostics.iter().map(diagnostic).collect()),
        }
    }

    fn ask<T: 'static>(self: &Arc<Self>, answer: impl Fn(&Self) -> T + Send + Sync + 'static) -> Ask<T> {
        let wiring = self.clone();
        Arc::new(move || answer(&wiring))
    }

    fn status(&self) -> Status {
        let totals = self.context.metrics.totals(telemetry::connections::Protocol::Tcp);
        let report = self.reports.borrow().clone();
        let local = self.context.snapshot.load().workloads().values().filter(|w| w.node == self.context.node).count();
        let health = self.catalog.borrow();
        let errors = health.diagnostics.iter().filter(|finding| finding.severity == Severity::Error).count();
        Status {
            node: self.context.node.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            abi: mesh_common::ABI_VERSION,
            uptime_seconds: self.started.elapsed().as_secs(),
            config: ConfigStatus {
                generation: report.generation,
                objects: health.objects.iter().map(|(kind, count)| ((*kind).to_owned(), *count as u64)).collect(),
                errors: errors as u64,
            },
            workloads: WorkloadCounts {
                local: local as u64,
                armed: report.armed.len() as u64,
                failed: report.failed.len() as u64,
            },
            connections: ConnectionCounts {
                active: totals.active,
                opened: totals.opened,
                closed: totals.closed,
                failed: totals.failed,
                bytes_sent: totals.sent,
                bytes_received: totals.received,
            },
            lanes: self.context.tunnel.lanes().len() as u64,
            certificates: self.certificates(),
            outcomes: self.outcomes(),
            maps: self.maps(),
            ..Status::default()
        }
    }

    fn certificates(&self) -> Vec<CertificateRow> {
        certificates::rows(&self.identities)
    }

    fn outcomes(&self) -> Vec<OutcomeRow> {
        let counts = self.counters.outcomes().into_iter();
        counts
            .map(|(outcome, count)| OutcomeRow {
                hook: outcome.hook().to_owned(),
                verdict: outcome.verdict().to_owned(),
                reason: outcome.reason().to_owned(),
                count,
            })
            .collect()
    }

    fn maps(&self) -> Vec<MapRow> {
        let usage = self.counters.map_usage().into_iter();
        usage
            .map(|map| MapRow {
                name: map.name.to_owned(),
                entries: map.entries,
                capacity: map.capacity,
                bytes: map.bytes,
            })
            .collect()
    }

    fn workloads(&self) -> Vec<WorkloadRow> {
        let report = self.reports.borrow().clone();
        let snapshot = self.context.snapshot.load();
        snapshot.workloads().values().map(|workload| self.workload(workload, &report)).collect()
    }

    fn workload(&self, workload: &Workload, report: &Report) -> WorkloadRow {
        let reason = report.failed.get(&workload.uid).cloned();
        let state = match () {
            () if workload.node != self.context.node => "remote",
            () if workload.mode == Mode::Disabled => "disabled",
            () if report.armed.contains(&workload.uid) => "armed",
            () if reason.is_some() => "failed",
            () => "pending",
        };
        WorkloadRow {
            namespace: workload.name.namespace().to_owned(),
            name: workload.name.name().to_owned(),
            node: workload.node.to_string(),
            addresses: workload.addresses.iter().map(ToString::to_string).collect(),
            network: if workload.is_host_network() { "host" } else { "own" }.to_owned(),
            mode: match workload.mode {
                Mode::Disabled => "disabled",
                Mode::Permissive => "permissive",
                Mode::Strict => "strict",
            }
            .to_owned(),
            identity: workload.identity.to_string(),
            state: state.to_owned(),
            reason,
        }
    }

    fn services(&self) -> Vec<ServiceRow> {
        let snapshot = self.context.snapshot.load();
        snapshot
            .services()
            .values()
            .map(|service| {
                let mut members: Vec<_> = snapshot
                    .frontends()
                    .values()
                    .chain(snapshot.datagram_frontends().values())
                    .filter(|frontend| frontend.service.name == service.name)
                    .flat_map(|frontend| frontend.endpoints.iter())
                    .map(|endpoint| (endpoint.workload.uid.clone(), endpoint.workload.node == self.context.node))
                    .collect();
                members.sort();
                members.dedup();
                let local = members.iter().filter(|(_, is_local)| *is_local).count() as u64;
                service_row(service, EndpointCounts { total: members.len() as u64, local })
            })
            .collect()
    }
}

fn service_row(service: &Service, endpoints: EndpointCounts) -> ServiceRow {
    let port = |port: &crate::model::ServicePort| {
        let protocol = match port.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        };
        match &*port.name {
            "" => format!("{}/{protocol}", port.port),
            name => format!("{name}:{}/{protocol}", port.port),
        }
    };
    ServiceRow {
        namespace: service.name.namespace().to_owned(),
        name: service.name.name().to_owned(),
        vips: service.vips.iter().map(ToString::to_string).collect(),
        ports: service.ports.iter().map(port).collect(),
        endpoints,
    }
}

fn lane(status: &LaneStatus) -> LaneRow {
    LaneRow {
        transport: status.transport.to_owned(),
        class: status.kind.to_owned(),
        node: status.peer.node.to_string(),
        address: status.peer.address.to_string(),
        source_identity: status.peer.source.to_string(),
        destination_identity: status.peer.destination.to_string(),
        streams: status.streams as u64,
        age_seconds: status.age.as_secs_f64(),
        draining: status.is_draining,
        group: status.tls.group.clone(),
        suite: status.tls.suite.clone(),
        packet_bytes: status.packet,
    }
}

fn diagnostic(finding: &Diagnostic) -> DiagnosticRow {
    DiagnosticRow {
        file: finding.file.clone(),
        line: finding.line,
        column: finding.column,
        code: finding.code.to_string(),
        severity: finding.severity.as_str().to_owned(),
        object: finding.object.clone(),
        message: finding.message.clone(),
        help: finding.help.clone(),
    }
}
