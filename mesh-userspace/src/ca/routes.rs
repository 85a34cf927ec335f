//! The endpoints: JSON in, JSON out, bounded in size and time.

use super::service::Service;
use super::wire::{
    BundleAnswer, Bytes, IdentityAnswer, JoinAnswer, JoinRequest, RefusalAnswer, RenewAnswer, RenewRequest, SignAnswer,
    SignRequest,
};
use super::{CaError, Reason, Refusal};
use crate::identity::{SignedChain, TrustBundle};
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use rustls_pki_types::CertificateDer;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// The longest request: [`MAX_REQUESTS`] of the longest kind fit.
const MAX_BODY: usize = 2 << 20;
/// Identities in one request.
pub(super) const MAX_REQUESTS: usize = 256;
/// From a request's head to its answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// One connection, and who is at its other end.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) service: Arc<Service>,
    pub(super) address: SocketAddr,
    /// The client's certificate, if it presented one. TLS has verified its chain.
    pub(super) leaf: Option<CertificateDer<'static>>,
}

pub(super) fn router(caller: Caller) -> Router {
    Router::new()
        .route("/v1/join", post(join))
        .route("/v1/renew", post(renew))
        .route("/v1/sign", post(sign))
        .route("/v1/bundle", get(bundle))
        .fallback(|State(caller): State<Caller>, uri: Uri| async move {
            let message = format!("there is no {}", uri.path());
            caller.refuse(Refusal::new(Reason::RequestMalformed, message).into())
        })
        .with_state(caller)
}

async fn join(State(caller): State<Caller>, request: Request) -> Response {
    caller
        .answer(request, |caller, request: JoinRequest| {
            let joined = caller.service.join(&request.token, &request.node, &request.csr.0)?;
            Ok(JoinAnswer { chain: chain(joined.chain), bundle: shown(joined.bundle) })
        })
        .await
}

async fn renew(State(caller): State<Caller>, request: Request) -> Response {
    caller
        .answer(request, |caller, request: RenewRequest| {
            let node = caller.node(1)?;
            Ok(RenewAnswer { chain: chain(caller.service.renew(&node, &request.csr.0)?) })
        })
        .await
}

async fn sign(State(caller): State<Caller>, request: Request) -> Response {
    caller
        .answer(request, |caller, request: SignRequest| {
            if request.requests.len() > MAX_REQUESTS {
                let message = format!("{MAX_REQUESTS} identities at most may be asked for at once");
                return Err(Refusal::new(Reason::RequestMalformed, message).into());
            }
            let node = caller.node(1 + request.requests.len())?;
            let answers =
                request.requests.iter().map(|request| match caller.service.sign(&node, &request.id, &request.csr.0) {
                    Ok(signed) => IdentityAnswer::Chain(chain(signed)),
                    Err(error) => IdentityAnswer::Refused(told(&caller.service.refused(error, node.as_str()))),
                });
            Ok(SignAnswer { answers: answers.collect() })
        })
        .await
}

#[derive(Deserialize)]
struct Have {
    #[serde(default)]
    have: u64,
}

async fn bundle(State(caller): State<Caller>, Query(have): Query<Have>) -> Response {
    caller
        .run(move |caller| {
            let node = caller.node(1)?;
            Ok(shown(caller.service.bundle(&node, have.have)?))
        })
        .await
}

impl Caller {
    fn node(&self, cost: usize) -> Result<crate::model::NodeName, CaError> {
        self.service.caller(self.leaf.as_ref(), cost)
    }

    /// Reads a request, and answers it where blocking is allowed.
    async fn answer<Q, A>(
        self,
        request: Request,
        answer: impl FnOnce(&Self, Q) -> Result<A, CaError> + Send + 'static,
    ) -> Response
    where
        Q: DeserializeOwned,
        A: Serialize + Send + 'static,
    {
        let malformed = |message: String| CaError::from(Refusal::new(Reason::RequestMalformed, message));
        let reading = axum::body::to_bytes(request.into_body(), MAX_BODY);
        let body = match tokio::time::timeout(REQUEST_TIMEOUT, reading).await {
            Ok(Ok(body)) => body,
            Ok(Err(error)) => return self.refuse(malformed(format!("the request cannot be read: {error}"))),
            Err(_) => return self.refuse(malformed("the request did not arrive in time".to_owned())),
        };
        self.run(move |caller| {
            let request = serde_json::from_slice(&body)
                // The text of the error may repeat the request, and the request may hold a token.
                .map_err(|error| malformed(format!("the request is not understood: line {}", error.line())))?;
            answer(caller, request)
        })
        .await
    }

    async fn run<A: Serialize + Send + 'static>(
        self,
        answer: impl FnOnce(&Self) -> Result<A, CaError> + Send + 'static,
    ) -> Response {
        let caller = self.clone();
        match tokio::task::spawn_blocking(move || answer(&caller)).await {
            Ok(Ok(answer)) => Json(answer).into_response(),
            Ok(Err(error)) => self.refuse(error),
            Err(panic) => self.refuse(Refusal::new(Reason::Internal, panic.to_string()).into()),
        }
    }

    fn refuse(&self, error: CaError) -> Response {
        let refusal = self.service.refused(error, &self.address.to_string());
        (status(refusal.reason), Json(told(&refusal))).into_response()
    }
}

fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::RequestMalformed
        | Reason::TokenMalformed
        | Reason::CsrMalformed
        | Reason::CsrSignature
        | Reason::CsrKey
        | Reason::CsrNames
        | Reason::Lifetime => StatusCode::BAD_REQUEST,
        Reason::NoCertificate => StatusCode::UNAUTHORIZED,
        Reason::TooMany => StatusCode::TOO_MANY_REQUESTS,
        Reason::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        Reason::TokenUnknown
        | Reason::TokenUsed
        | Reason::TokenExpired
        | Reason::TokenRevoked
        | Reason::TokenOtherNode
        | Reason::NodeExists
        | Reason::NodeRevoked
        | Reason::NodeUnknown
        | Reason::NotANode
        | Reason::CertificateStale
        | Reason::NotScheduled
        | Reason::ForeignIdentity
        | Reason::Full
        | Reason::RotationUnderWay => StatusCode::FORBIDDEN,
    }
}

fn told(refusal: &Refusal) -> RefusalAnswer {
    RefusalAnswer { reason: refusal.reason.as_str().to_owned(), message: refusal.message.clone() }
}

fn chain(signed: SignedChain) -> Vec<Bytes> {
    signed.0.into_iter().map(|certificate| Bytes(certificate.to_vec())).collect()
}

fn shown(bundle: TrustBundle) -> BundleAnswer {
    let roots = bundle.roots.into_iter().map(|root| Bytes(root.to_vec())).collect();
    BundleAnswer { roots, version: bundle.version, epoch: bundle.epoch }
}
