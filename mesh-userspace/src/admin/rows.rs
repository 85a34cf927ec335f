//! The unix socket: the CLI's documents.

use super::documents::{ConnectionRow, Document, ErrorDocument, Item};
use super::{Ask, Hosted, Sources, authority, policy_rows};
use axum::extract::{Query, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

/// Connections in an answer where the request does not say.
const DEFAULT_LIMIT: usize = 1_000;

pub(super) fn router(sources: Sources) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/workloads", get(|State(sources): State<Sources>| list(sources.workloads)))
        .route("/v1/services", get(|State(sources): State<Sources>| list(sources.services)))
        .route("/v1/lanes", get(|State(sources): State<Sources>| list(sources.lanes)))
        .route("/v1/endpoints", get(|State(sources): State<Sources>| list(sources.endpoints)))
        .route("/v1/diagnostics", get(|State(sources): State<Sources>| list(sources.diagnostics)))
        .route("/v1/connections", get(connections))
        .merge(super::certificates::routes())
        .merge(policy_rows::routes())
        .merge(authority::router(sources.authority.clone()))
        .fallback(absent)
        .with_state(sources)
}

/// Of a process that is a certificate authority and nothing else.
pub(super) fn authority_router(hosted: Hosted) -> Router {
    authority::router(Some(hosted)).fallback(absent)
}

async fn absent(uri: Uri) -> Response {
    failed(StatusCode::NOT_FOUND, format!("there is no {}", uri.path()))
}

async fn status(State(sources): State<Sources>) -> Response {
    let document = ask(move || {
        let mut status = (sources.status)();
        status.not_ready = (sources.not_ready)();
        status.ready = status.not_ready.is_empty();
        Document::new(vec![status])
    });
    answer(document.await)
}

pub(super) async fn list<T: Item + Serialize + Send + 'static>(rows: Ask<Vec<T>>) -> Response {
    answer(ask(move || Document::new(rows())).await)
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<usize>,
}

async fn connections(State(sources): State<Sources>, Query(limit): Query<Limit>) -> Response {
    let document = ask(move || {
        let snapshot = (sources.connections)(limit.limit.unwrap_or(DEFAULT_LIMIT));
        let rows = snapshot.connections.iter().map(ConnectionRow::from).collect();
        Document { total: Some(snapshot.total), ..Document::new(rows) }
    });
    answer(document.await)
}

/// Runs a closure where blocking is allowed: it may read kernel maps and /proc.
pub(super) async fn ask<T: Send + 'static>(
    question: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    tokio::task::spawn_blocking(question).await
}

pub(super) fn answer<T: Serialize>(document: Result<Document<T>, tokio::task::JoinError>) -> Response {
    match document {
        Ok(document) => Json(document).into_response(),
        Err(error) => refused(&error),
    }
}

/// The answer to a question that panicked.
pub(super) fn refused(error: &tokio::task::JoinError) -> Response {
    tracing::error!(%error, "an admin request failed");
    failed(StatusCode::INTERNAL_SERVER_ERROR, "the daemon failed to answer; its log says why".to_owned())
}

pub(super) fn failed(status: StatusCode, message: String) -> Response {
    (status, Json(ErrorDocument::new(message))).into_response()
}
