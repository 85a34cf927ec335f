//! One request to an authority: TLS and HTTP/1.1, bounded in time and size.

use crate::ca::wire::RefusalAnswer;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, ServerName};
use serde::de::DeserializeOwned;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// The longest answer read: chains for as many identities as one request may name.
const MAX_ANSWER: usize = 4 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{address} cannot be reached: {error}")]
    Unreachable { address: String, error: io::Error },
    /// The server has not the certificate that it must have. Nothing was said to it.
    #[error("{address} is not the certificate authority that was expected: {error}")]
    WrongAuthority { address: String, error: rustls::Error },
    /// The authority does not accept this node's certificate, or the handshake broke off.
    #[error("the TLS handshake with {address} failed: {error}")]
    Handshake { address: String, error: io::Error },
    #[error("{address} did not answer within {} s", .timeout.as_secs_f64())]
    Timeout { address: String, timeout: Duration },
    #[error("{address} broke off: {message}")]
    BrokeOff { address: String, message: String },
    #[error("{} ({})", .0.message, .0.reason)]
    Refused(RefusalAnswer),
    #[error("the answer of {address} is not understood: {message}")]
    Invalid { address: String, message: String },
}

/// How to speak to an authority.
#[derive(Clone, Debug)]
pub(super) struct Dial {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
    /// For everything, from the first packet to the last.
    pub(super) timeout: Duration,
}

impl Dial {
    /// Asks, and reads the answer. `body` makes the JSON to be sent from the server's certificate: it is asked only
    /// after the server has proved itself.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        address: &str,
        method: Method,
        path: &str,
        body: impl FnOnce(&CertificateDer<'_>) -> Result<Vec<u8>, String>,
    ) -> Result<T, Failure> {
        let asking = self.exchange(address, method, path, body);
        let timeout = self.timeout;
        match tokio::time::timeout(timeout, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::Timeout { address: address.to_owned(), timeout }),
        }
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        address: &str,
        method: Method,
        path: &str,
        body: impl FnOnce(&CertificateDer<'_>) -> Result<Vec<u8>, String>,
    ) -> Result<T, Failure> {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| Failure::Unreachable { address: address.to_owned(), error })?;
        let connector = TlsConnector::from(self.config.clone());
        let stream = connector.connect(self.name.clone(), stream).await.map_err(|error| handshake(address, error))?;
        let invalid = |message: String| Failure::Invalid { address: address.to_owned(), message };
        let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let body = leaf.ok_or_else(|| "it presented no certificate".to_owned()).and_then(body).map_err(invalid)?;
        let broke_off = |error: &dyn std::fmt::Display| Failure::BrokeOff {
            address: address.to_owned(),
            message: error.to_string(),
        };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| broke_off(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "nodemesh-ca")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| broke_off(&error))?;
        let reading = async {
            let answer = sender.send_request(request).await.map_err(|error| broke_off(&error))?;
            let status = answer.status();
            let body =
                Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(|error| broke_off(&error))?;
            Ok((status, body.to_bytes()))
        };
        // The connection is driven here rather than by a task of its own: dropping the future closes it.
        let (status, body) = drive(connection, reading).await?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| invalid(error.to_string()));
        }
        let refusal = serde_json::from_slice(&body).map_err(|_| invalid(status.to_string()))?;
        Err(Failure::Refused(refusal))
    }
}

/// Runs `reading` while `connection` moves its bytes.
async fn drive<T>(connection: impl Future<Output = hyper::Result<()>>, reading: impl Future<Output = T>) -> T {
    let mut reading = std::pin::pin!(reading);
    tokio::select! {
        biased;
        answer = reading.as_mut() => return answer,
        // Its errors come out at the request as well.
        _ = connection => {}
    }
    reading.await
}

/// With TLS 1.3 a server refuses a client's certificate after the client's handshake is over; then it is `BrokeOff`.
fn handshake(address: &str, error: io::Error) -> Failure {
    let address = address.to_owned();
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(inner @ rustls::Error::InvalidCertificate(_)) => Failure::WrongAuthority { address, error: inner.clone() },
        _ => Failure::Handshake { address, error },
    }
}
