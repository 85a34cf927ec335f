//! Asks the daemon: one HTTP request over its unix socket, bounded in time and size.

use crate::admin::documents::{Document, ErrorDocument, Item};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// The longest answer read. All connections of a busy node fit.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// Why there is no answer. The text says what happened, [`FetchError::help`] what to do.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("nodemeshd does not answer at {}: {error}", .socket.display())]
    Unreachable { socket: PathBuf, error: io::Error },
    #[error("nodemeshd at {} did not answer within {} s", .socket.display(), .timeout.as_secs())]
    Timeout { socket: PathBuf, timeout: Duration },
    #[error("nodemeshd at {} broke off: {message}", .socket.display())]
    BrokeOff { socket: PathBuf, message: String },
    #[error("nodemeshd refused: {0}")]
    Refused(String),
    #[error("the answer is not understood: {0}")]
    Unknown(String),
    #[error("this command cannot start: {0}")]
    Runtime(io::Error),
}

impl FetchError {
    /// Whether there is no daemon that could answer.
    pub(super) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Timeout { .. } | Self::BrokeOff { .. })
    }

    pub(super) fn help(&self) -> Option<&'static str> {
        match self {
            Self::Unreachable { error, .. } => Some(match error.kind() {
                ErrorKind::NotFound => {
                    "start it with `nodemeshd run -c FILE`, or name its socket (`admin.socket` in FILE) with --socket"
                }
                ErrorKind::ConnectionRefused => {
                    "it has stopped without removing its socket: look into its log, then start it with \
                     `nodemeshd run -c FILE`"
                }
                ErrorKind::PermissionDenied => {
                    "only the user that nodemeshd runs as may ask it: run this command as that user (root)"
                }
                _ => "name the daemon's socket (`admin.socket` in its configuration) with --socket",
            }),
            Self::Timeout { .. } => {
                Some("it runs but is stuck or very busy: look into its log; --timeout waits longer")
            }
            Self::BrokeOff { .. } => Some("it may just be stopping: look into its log"),
            Self::Unknown(_) => Some("nodemesh and nodemeshd are of different versions: `nodemesh version` shows them"),
            Self::Refused(_) | Self::Runtime(_) => None,
        }
    }
}

/// A value as it stands in a query: everything but letters, digits and `-_.~` is escaped.
pub(super) fn encode(value: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    value.bytes().map(byte).collect()
}

/// A daemon, known by its socket.
pub(super) struct Daemon<'a> {
    socket: &'a Path,
    timeout: Duration,
}

impl<'a> Daemon<'a> {
    pub(super) fn new(socket: &'a Path, timeout: Duration) -> Self {
        Self { socket, timeout }
    }

    /// Fetches a document and checks that it is what this version understands.
    pub(super) fn get<T: Item + DeserializeOwned>(&self, path: &str) -> Result<Document<T>, FetchError> {
        self.send(Method::GET, path, Vec::new())
    }

    /// Asks for something to be done; the answer says what was.
    pub(super) fn post<T: Item + DeserializeOwned>(&self, path: &str) -> Result<Document<T>, FetchError> {
        self.send(Method::POST, path, Vec::new())
    }

    /// Asks for a change, with a JSON body, and reads the document that answers it.
    pub(super) fn send<T: Item + DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Document<T>, FetchError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let request = async {
            let timeout = FetchError::Timeout { socket: self.socket.to_owned(), timeout: self.timeout };
            tokio::time::timeout(self.timeout, self.request(method, path, body)).await.unwrap_or(Err(timeout))
        };
        let body = runtime.map_err(FetchError::Runtime)?.block_on(request)?;
        let document: Document<T> =
            serde_json::from_slice(&body).map_err(|error| FetchError::Unknown(error.to_string()))?;
        if document.is_known() {
            Ok(document)
        } else {
            let Document { api_version, kind, .. } = document;
            Err(FetchError::Unknown(format!("it is {api_version} {kind}")))
        }
    }

    async fn request(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Bytes, FetchError> {
        let stream = UnixStream::connect(self.socket)
            .await
            .map_err(|error| FetchError::Unreachable { socket: self.socket.to_owned(), error })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broke_off(&error))?;
        // Errors of the connection come out at the request as well.
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "nodemeshd")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| FetchError::Unknown(error.to_string()))?;
        let answer = sender.send_request(request).await.map_err(|error| self.broke_off(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| FetchError::BrokeOff { socket: self.socket.to_owned(), message: error.to_string() })?
            .to_bytes();
        driver.abort();
        if status.is_success() {
            return Ok(body);
        }
        let said = serde_json::from_slice::<ErrorDocument>(&body);
        Err(FetchError::Refused(said.map_or_else(|_| status.to_string(), |error| error.message)))
    }

    fn broke_off(&self, error: &hyper::Error) -> FetchError {
        FetchError::BrokeOff { socket: self.socket.to_owned(), message: error.to_string() }
    }
}
