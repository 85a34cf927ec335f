//! Certificates and roots of this node, and the request to renew them.

use super::documents::{CertificateRow, Document, RootRow, RotationRow};
use super::rows::{answer, ask, failed, list, refused};
use super::{Ask, Sources};
use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use serde::Deserialize;
use std::fmt;
use std::sync::Arc;

/// Finds an identity's chain.
type FindChain = dyn Fn(&str) -> Option<String> + Send + Sync;
/// Renews one identity, or all.
type Rotate = dyn Fn(Option<&str>) -> Result<usize, String> + Send + Sync;

/// What is asked about certificates. Identities are named by their SPIFFE IDs.
#[derive(Clone)]
pub struct Certificates {
    pub list: Ask<Vec<CertificateRow>>,
    /// The chain of an identity as PEM, if there is one.
    pub chain: Arc<FindChain>,
    pub bundle: Ask<Vec<RootRow>>,
    /// Renews one identity, or all, now: how many, or why not.
    pub rotate: Arc<Rotate>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

pub(super) fn routes() -> Router<Sources> {
    Router::new()
        .route("/v1/certificates", get(certificates))
        .route("/v1/certificates/rotate", post(rotate))
        .route("/v1/bundle", get(|State(sources): State<Sources>| list(sources.certificates.bundle)))
}

#[derive(Deserialize)]
struct Which {
    id: Option<String>,
}

async fn certificates(State(sources): State<Sources>, Query(which): Query<Which>) -> Response {
    let Some(id) = which.id else { return list(sources.certificates.list).await };
    let wanted = id.clone();
    let row = ask(move || {
        let row = (sources.certificates.list)().into_iter().find(|row| row.id == wanted);
        row.map(|row| CertificateRow { pem: (sources.certificates.chain)(&wanted), ..row })
    });
    match row.await {
        Ok(Some(row)) => answer(Ok(Document::new(vec![row]))),
        Ok(None) => failed(StatusCode::NOT_FOUND, format!("this node has no identity {id}")),
        Err(error) => refused(&error),
    }
}

async fn rotate(State(sources): State<Sources>, Query(which): Query<Which>) -> Response {
    let rotate = sources.certificates.rotate;
    let only = which.id.clone();
    match ask(move || rotate(only.as_deref())).await {
        Ok(Ok(count)) => answer(Ok(Document::new(vec![RotationRow { id: which.id, identities: count as u64 }]))),
        Ok(Err(message)) => failed(StatusCode::CONFLICT, message),
        Err(error) => refused(&error),
    }
}
