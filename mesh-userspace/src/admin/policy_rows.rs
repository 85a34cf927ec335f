//! The answers about policy.

use super::documents::{Document, Item};
use super::policies::{PathRow, PlaintextRow, PolicyRow};
use super::rows::{answer, ask, failed, list, refused};
use super::traffic::TrafficRow;
use super::{Ask, Sources};
use crate::model::Protocol;
use crate::proxy::explain::Question;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use serde::Deserialize;
use std::fmt;
use std::sync::Arc;

/// Answers a question about a connection.
type Explain = dyn Fn(&Question) -> Result<Vec<PathRow>, String> + Send + Sync;

/// Where the answers come from.
#[derive(Clone)]
pub struct PolicySources {
    pub policies: Ask<Vec<PolicyRow>>,
    pub traffic: Ask<Vec<TrafficRow>>,
    pub plaintext: Ask<Vec<PlaintextRow>>,
    /// The error says what is unclear about the question.
    pub explain: Arc<Explain>,
}

impl fmt::Debug for PolicySources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicySources").finish_non_exhaustive()
    }
}

pub(super) fn routes() -> Router<Sources> {
    Router::new()
        .route("/v1/policies", get(|State(sources): State<Sources>| list(sources.policy.policies)))
        .route("/v1/traffic", get(|State(sources): State<Sources>| list(sources.policy.traffic)))
        .route("/v1/plaintext", get(|State(sources): State<Sources>| list(sources.policy.plaintext)))
        .route("/v1/explain", get(explain))
}

#[derive(Deserialize)]
struct Asked {
    source: String,
    destination: String,
    port: Option<u16>,
    protocol: Option<String>,
}

async fn explain(State(sources): State<Sources>, Query(asked): Query<Asked>) -> Response {
    let protocol = match asked.protocol.as_deref() {
        None => None,
        Some("tcp") => Some(Protocol::Tcp),
        Some("udp") => Some(Protocol::Udp),
        Some(other) => return failed(StatusCode::BAD_REQUEST, format!("{other:?} is no protocol: tcp or udp")),
    };
    let question = Question { source: asked.source, destination: asked.destination, port: asked.port, protocol };
    match ask(move || (sources.policy.explain)(&question)).await {
        Ok(Ok(paths)) => in_order(paths),
        Ok(Err(unclear)) => failed(StatusCode::BAD_REQUEST, unclear),
        Err(error) => refused(&error),
    }
}

fn in_order<T: Item + serde::Serialize>(rows: Vec<T>) -> Response {
    answer(Ok(Document::new(rows)))
}
