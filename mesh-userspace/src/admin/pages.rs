//! The TCP port: what a scraper and a load balancer ask.

use super::Process;
use super::rows::{ask, refused};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

pub(super) fn router(process: Process) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/readyz", get(readyz))
        .route("/healthz", get(|| async { "ok\n" }))
        .fallback(|| async { (StatusCode::NOT_FOUND, "try /metrics, /readyz or /healthz\n") })
        .with_state(process)
}

async fn metrics(State(process): State<Process>, headers: HeaderMap) -> Response {
    let accept: Vec<&str> = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let accept = (!accept.is_empty()).then(|| accept.join(","));
    let metrics = process.metrics.clone();
    match ask(move || metrics.encode(accept.as_deref())).await {
        Ok((content_type, text)) => ([(header::CONTENT_TYPE, content_type)], text).into_response(),
        Err(error) => refused(&error),
    }
}

async fn readyz(State(process): State<Process>) -> Response {
    match ask(move || (process.not_ready)()).await {
        Ok(reasons) if reasons.is_empty() => "ready\n".into_response(),
        Ok(reasons) => {
            let text: String = reasons.iter().map(|reason| format!("not ready: {reason}\n")).collect();
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
        Err(error) => refused(&error),
    }
}
