//! The unix socket of a process with a certificate authority: tokens, nodes, rotation. Unlike the rest of the admin
//! interface these change something; the socket's mode says who may.

use super::ca_documents::{CaRow, NodeRow, RotateRequest, TokenRequest, TokenRow};
use super::documents::{Document, Item, timestamp};
use super::rows::{answer, ask, failed};
use crate::ca::{CaError, DEFAULT_TOKEN_TTL, Reason, Refusal, Rotate, Service, TokenId};
use crate::model::NodeName;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{delete, get, post};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;

/// The longest request.
const MAX_BODY: usize = 16 << 10;

/// The authority of this process, if there is one, and where it listens.
#[derive(Clone)]
pub struct Hosted {
    pub service: Arc<Service>,
    pub listen: Vec<SocketAddr>,
}

type Here = Option<Arc<Hosted>>;

pub(super) fn router<S: Clone + Send + Sync + 'static>(hosted: Option<Hosted>) -> Router<S> {
    Router::new()
        .route("/v1/tokens", get(tokens).post(create_token))
        .route("/v1/tokens/{id}", delete(revoke_token))
        .route("/v1/nodes", get(nodes))
        .route("/v1/nodes/{name}/revoke", post(revoke_node))
        .route("/v1/ca", get(status))
        .route("/v1/ca/rotate", post(rotate))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .with_state(hosted.map(Arc::new))
}

async fn tokens(State(here): State<Here>) -> Response {
    perform(here, |hosted| {
        let tokens = hosted.service.authority().tokens(OffsetDateTime::now_utc())?;
        Ok(tokens.into_iter().map(TokenRow::from).collect())
    })
    .await
}

async fn create_token(State(here): State<Here>, body: axum::body::Bytes) -> Response {
    perform(here, move |hosted| {
        let request: TokenRequest = parse(&body)?;
        let node = request.node.map(|node| NodeName::parse(&node)).transpose().map_err(|error| malformed(&error))?;
        let ttl = request.ttl_seconds.map_or(DEFAULT_TOKEN_TTL, Duration::from_secs);
        let now = OffsetDateTime::now_utc();
        let made = hosted.service.authority().create_token(ttl, node.as_ref(), now)?;
        Ok(vec![TokenRow {
            created: timestamp(now.into()),
            id: made.token.id().to_string(),
            state: "open".to_owned(),
            node: made.node.map(|node| node.to_string()),
            used_by: None,
            expires: timestamp(made.expires.into()),
            token: Some(made.token.reveal().to_string()),
            addresses: hosted.listen.iter().map(ToString::to_string).collect(),
        }])
    })
    .await
}

async fn revoke_token(State(here): State<Here>, Path(id): Path<String>) -> Response {
    perform(here, move |hosted| {
        let id = TokenId::parse(&id).map_err(|error| malformed(&error))?;
        let (authority, now) = (hosted.service.authority(), OffsetDateTime::now_utc());
        authority.revoke_token(&id, now)?;
        let revoked = authority.tokens(now)?.into_iter().filter(|token| token.id == id.as_str());
        Ok(revoked.map(TokenRow::from).collect())
    })
    .await
}

async fn nodes(State(here): State<Here>) -> Response {
    perform(here, |hosted| Ok(hosted.service.authority().nodes()?.into_iter().map(NodeRow::from).collect())).await
}

async fn revoke_node(State(here): State<Here>, Path(name): Path<String>) -> Response {
    perform(here, move |hosted| {
        let node = NodeName::parse(&name).map_err(|error| malformed(&error))?;
        let authority = hosted.service.authority();
        authority.revoke_node(&node, OffsetDateTime::now_utc())?;
        let revoked = authority.nodes()?.into_iter().filter(|row| row.name == node.as_str());
        Ok(revoked.map(NodeRow::from).collect())
    })
    .await
}

async fn status(State(here): State<Here>) -> Response {
    perform(here, shown).await
}

async fn rotate(State(here): State<Here>, body: axum::body::Bytes) -> Response {
    perform(here, move |hosted| {
        let request: RotateRequest = parse(&body)?;
        let what = match request.what.as_str() {
            "root" => Rotate::Root,
            "intermediate" => Rotate::Intermediate,
            other => return Err(malformed(&format!("{other:?} cannot be rotated: root or intermediate"))),
        };
        hosted.service.rotate(what, request.now, OffsetDateTime::now_utc())?;
        shown(hosted)
    })
    .await
}

fn shown(hosted: &Hosted) -> Result<Vec<CaRow>, CaError> {
    Ok(vec![hosted.service.authority().status(OffsetDateTime::now_utc())?.into()])
}

/// Runs a request where it may wait for the disk; says so where there is no authority.
async fn perform<T: Item + Serialize + Send + 'static>(
    here: Here,
    request: impl FnOnce(&Hosted) -> Result<Vec<T>, CaError> + Send + 'static,
) -> Response {
    let Some(hosted) = here else {
        let message = "no certificate authority runs in this process: ask the one that does with --socket \
                       (`admin.socket` of its configuration), or add a section `ca` to this daemon's";
        return failed(StatusCode::NOT_FOUND, message.to_owned());
    };
    match ask(move || request(&hosted).map(Document::new)).await {
        Ok(Ok(document)) => answer(Ok(document)),
        Ok(Err(CaError::Refused(refusal))) => {
            let status = match refusal.reason {
                Reason::NodeUnknown | Reason::TokenUnknown => StatusCode::NOT_FOUND,
                Reason::Internal => StatusCode::INTERNAL_SERVER_ERROR,
                Reason::RequestMalformed | Reason::Lifetime => StatusCode::BAD_REQUEST,
                _ => StatusCode::CONFLICT,
            };
            failed(status, refusal.message)
        }
        Ok(Err(error)) => {
            tracing::error!(%error, "an admin request failed");
            failed(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
        }
        Err(error) => answer::<T>(Err(error)),
    }
}

/// No body at all stands for every default.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, CaError> {
    let body: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| malformed(&error))
}

fn malformed(error: &dyn std::fmt::Display) -> CaError {
    Refusal::new(Reason::RequestMalformed, error.to_string()).into()
}
