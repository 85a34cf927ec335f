//! One probe: connect, and where the check says so, ask over HTTP/1.1 or gRPC.

use crate::model::{HealthCheck, Probe};
use crate::proxy::{Dialler, Failure, LocalWorkload};
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

/// How the daemon calls itself.
const AGENT: &str = concat!("nodemesh/", env!("CARGO_PKG_VERSION"), " health check");
/// `grpc.health.v1.HealthCheckResponse.ServingStatus.SERVING`.
const SERVING: i32 = 1;
/// The longest answer of a gRPC health service that is read; a good one has seven bytes.
const MAX_ANSWER: usize = 1024;
/// A gRPC message's prefix: not compressed, and its length.
const PREFIX: usize = 5;

/// What is wrong with an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unhealthy {
    /// Nothing listens.
    Refused,
    Unreachable,
    Timeout,
    /// It says so itself.
    Status,
    /// It does not speak the protocol of its check.
    Protocol,
}

impl Unhealthy {
    /// A stable label.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Status => "status",
            Self::Protocol => "protocol",
        }
    }
}

/// Probes an endpoint of this node once, within the check's timeout.
pub(super) async fn probe(
    dialler: &Dialler,
    local: &LocalWorkload,
    endpoint: SocketAddr,
    check: &HealthCheck,
) -> Result<(), Unhealthy> {
    let probing = async {
        // From its own address: the workload is asked by nobody but its node.
        let dialled = dialler.dial(local, endpoint, endpoint, check.timeout).await;
        let mut dialled = dialled.map_err(|failure| unreached(&failure))?;
        let app = &mut dialled.app;
        match &check.probe {
            Probe::Tcp => Ok(()),
            Probe::Http { path, host } => http(app, path, host.as_deref(), endpoint).await,
            Probe::Grpc { service } => grpc(app, service, endpoint).await,
        }
    };
    timeout(check.timeout, probing).await.unwrap_or(Err(Unhealthy::Timeout))
}

fn unreached(failure: &Failure) -> Unhealthy {
    match failure {
        Failure::ApplicationTimeout => Unhealthy::Timeout,
        Failure::Application(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Unhealthy::Refused,
        _ => Unhealthy::Unreachable,
    }
}

async fn http<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    path: &str,
    host: Option<&str>,
    endpoint: SocketAddr,
) -> Result<(), Unhealthy> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|_| Unhealthy::Protocol)?;
    let request = Request::get(path)
        .header(header::HOST, host.map_or_else(|| endpoint.to_string(), str::to_owned))
        .header(header::USER_AGENT, AGENT)
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|_| Unhealthy::Protocol)?;
    let answer = while_driven(connection, sender.send_request(request)).await;
    let status = answer.map_err(|_| Unhealthy::Protocol)?.status();
    if status.is_success() || status.is_redirection() { Ok(()) } else { Err(Unhealthy::Status) }
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `grpc.health.v1.Health/Check`.
async fn grpc<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    service: &str,
    endpoint: SocketAddr,
) -> Result<(), Unhealthy> {
    let (sender, connection) = h2::client::handshake(stream).await.map_err(|_| Unhealthy::Protocol)?;
    while_driven(connection, ask(sender, service, endpoint)).await
}

async fn ask(sender: h2::client::SendRequest<Bytes>, service: &str, endpoint: SocketAddr) -> Result<(), Unhealthy> {
    let protocol = |_: h2::Error| Unhealthy::Protocol;
    let mut sender = sender.ready().await.map_err(protocol)?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{endpoint}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, AGENT)
        .body(())
        .map_err(|_| Unhealthy::Protocol)?;
    let (answer, mut body) = sender.send_request(request, false).map_err(protocol)?;
    body.send_data(framed(&CheckRequest { service: service.to_owned() }), true).map_err(protocol)?;
    let answer = answer.await.map_err(protocol)?;
    if answer.status() != StatusCode::OK {
        return Err(Unhealthy::Status);
    }
    let mut body = answer.into_body();
    let mut received = BytesMut::new();
    while let Some(piece) = body.data().await {
        let piece = piece.map_err(protocol)?;
        // What is never given back is at most one window.
        let _ = body.flow_control().release_capacity(piece.len());
        received.put(piece);
        if received.len() > MAX_ANSWER {
            return Err(Unhealthy::Protocol);
        }
    }
    verdict(&received)
}

fn framed(message: &CheckRequest) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.encoded_len()).expect("a service's name is short"));
    framed.put_slice(&message.encode_to_vec());
    framed.freeze()
}

/// An answer without a message is an error: the service asked for is not known, or there is no health service.
fn verdict(body: &[u8]) -> Result<(), Unhealthy> {
    let Some((prefix, message)) = body.split_first_chunk::<PREFIX>() else { return Err(Unhealthy::Status) };
    let [0, length @ ..] = *prefix else { return Err(Unhealthy::Protocol) };
    if usize::try_from(u32::from_be_bytes(length)) != Ok(message.len()) {
        return Err(Unhealthy::Protocol);
    }
    let answer = CheckResponse::decode(message).map_err(|_| Unhealthy::Protocol)?;
    if answer.status == SERVING { Ok(()) } else { Err(Unhealthy::Status) }
}

/// Runs `asking` while `connection` moves its bytes; dropping the future closes it.
async fn while_driven<T>(connection: impl Future, asking: impl Future<Output = T>) -> T {
    let mut asking = std::pin::pin!(asking);
    tokio::select! {
        biased;
        answer = asking.as_mut() => return answer,
        _ = connection => {}
    }
    // The connection is over, and what it brought is still to be read.
    asking.await
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const ENDPOINT: ([u8; 4], u16) = ([10, 0, 0, 2], 8080);

    async fn http_answer(answer: &'static str) -> (Result<(), Unhealthy>, String) {
        let (client, mut server) = duplex(4096);
        let serving = async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(server.read_u8().await.unwrap());
            }
            server.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(request).unwrap()
        };
        tokio::join!(http(client, "/health?x=1", Some("shop.local"), ENDPOINT.into()), serving)
    }

    #[tokio::test]
    async fn http_is_healthy_from_200_to_399() {
        let (verdict, request) = http_answer("HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(verdict, Ok(()));
        assert!(
            request.starts_with("GET /health?x=1 HTTP/1.1\r\n") && request.contains("host: shop.local\r\n"),
            "{request}"
        );
        assert_eq!(http_answer("HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n").await.0, Ok(()));
        let broken = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(http_answer(broken).await.0, Err(Unhealthy::Status));
        assert_eq!(http_answer("220 mail.example.org ESMTP\r\n\r\n").await.0, Err(Unhealthy::Protocol));
        assert_eq!(http_answer("").await.0, Err(Unhealthy::Protocol));
    }

    /// What the health service is asked, and what comes of its answer.
    async fn grpc_answer(answer: &'static [u8]) -> Result<(), Unhealthy> {
        let (client, server) = duplex(64 * 1024);
        let serving = async move {
            let mut connection = h2::server::handshake(server).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let answered = tokio::spawn(async move {
                let mut body = request.into_body();
                let asked = body.data().await.unwrap().unwrap();
                assert_eq!(asked, &b"\0\0\0\0\x06\x0a\x04cart"[..]);
                let head =
                    hyper::Response::builder().header(header::CONTENT_TYPE, "application/grpc").body(()).unwrap();
                let mut send = respond.send_response(head, false).unwrap();
                send.send_data(Bytes::from_static(answer), false).unwrap();
                let mut trailers = hyper::HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                send.send_trailers(trailers).unwrap();
            });
            while connection.accept().await.is_some_and(|next| next.is_ok()) {}
            answered.await.unwrap();
        };
        tokio::join!(grpc(client, "cart", ENDPOINT.into()), serving).0
    }

    #[tokio::test]
    async fn grpc_is_healthy_when_it_says_serving() {
        assert_eq!(grpc_answer(b"\0\0\0\0\x02\x08\x01").await, Ok(()));
        assert_eq!(grpc_answer(b"\0\0\0\0\x02\x08\x02").await, Err(Unhealthy::Status));
        assert_eq!(grpc_answer(b"").await, Err(Unhealthy::Status));
        assert_eq!(grpc_answer(b"\0\0\0\0\x09\x08\x01").await, Err(Unhealthy::Protocol));
    }
}
