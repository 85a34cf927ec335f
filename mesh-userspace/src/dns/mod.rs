//! Names of services, for pods whose resolver is the mesh: standalone nodes need no other DNS. Answers about services
//! come from the catalog ([`zone`], [`answer`]: pure); every other name goes to the upstream servers ([`forward`]).

mod answer;
mod forward;
mod stream;
mod wire;
mod zone;

#[cfg(test)]
mod tests;

use crate::engine::Snapshot;
use crate::model::{Dns, Workload};
use crate::runtime::Level;
use crate::telemetry::dns::{AnsweredBy, DnsMetrics};
use answer::Outcome;
use arc_swap::ArcSwap;
use forward::Forwarder;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use wire::Question;

/// How a query came, and so how long its answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    Udp,
    Tcp,
}

/// Answers the queries of this node's workloads.
#[derive(Debug)]
pub struct Server {
    snapshot: Arc<ArcSwap<Snapshot>>,
    forwarder: Forwarder,
    metrics: DnsMetrics,
}

impl Server {
    #[must_use]
    pub fn new(snapshot: Arc<ArcSwap<Snapshot>>, metrics: DnsMetrics) -> Self {
        Self { snapshot, forwarder: Forwarder::new(metrics.clone()), metrics }
    }

    /// How full it is, now and whenever it is asked again.
    pub fn levels(&self) -> impl Fn() -> Vec<Level> + Send + Sync + 'static {
        let room = self.forwarder.room.clone();
        move || vec![room.level()]
    }

    /// Whether connections and datagrams to this address are queries for the mesh itself.
    #[must_use]
    pub fn is_at(&self, address: SocketAddr) -> bool {
        self.snapshot.load().mesh.as_ref().is_some_and(|mesh| mesh.answers_dns_at(address))
    }

    /// The answer to one datagram; empty if it deserves none.
    pub async fn answer(&self, caller: &Workload, query: &[u8]) -> Vec<u8> {
        self.answer_via(Via::Udp, caller, query).await
    }

    async fn answer_via(&self, via: Via, caller: &Workload, query: &[u8]) -> Vec<u8> {
        let began = Instant::now();
        // The snapshot is let go before anything is waited for.
        let (outcome, dns) = {
            let snapshot = self.snapshot.load();
            let Some(dns) = snapshot.mesh.as_ref().and_then(|mesh| mesh.dns.clone()) else { return Vec::new() };
            (answer::answer(query, via, caller.name.namespace(), &snapshot, &dns), dns)
        };
        let (reply, by, result) = match outcome {
            Outcome::Reply(reply, result) => (reply, AnsweredBy::Mesh, result.as_str()),
            Outcome::Forward(question) => self.forward(query, &question, &dns).await,
        };
        self.metrics.answered(by, result, began.elapsed());
        reply
    }

    async fn forward(&self, query: &[u8], question: &Question, dns: &Dns) -> (Vec<u8>, AnsweredBy, &'static str) {
        match self.forwarder.ask(query, question, &dns.upstream).await {
            Ok(reply) => (wire::fit(reply, question), AnsweredBy::Upstream, "forwarded"),
            Err(_) => (question.refusal(wire::SERVER_FAILURE), AnsweredBy::Upstream, "servfail"),
        }
    }
}
