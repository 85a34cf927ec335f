//! The two listeners. Each serves a bounded number of connections and gives every request a bounded time, so that a
//! stuck client cannot take the daemon's file descriptors.

use super::socket::{self, BoundSocket};
use super::{AuthoritySources, Process, Sources};
use super::{pages, rows};
use crate::runtime::{Acceptor, Level, Room};
use crate::telemetry::bounds::AcceptFailures;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

/// Connections at a time, each listener for itself.
const CONNECTIONS: usize = 64;
/// From accepting a connection, or from the last answer, to the end of the next request's head.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// What a connection may take in all. A scraper that keeps its connection open dials anew after it.
const CONNECTION_LIFETIME: Duration = Duration::from_mins(10);

#[derive(Clone, Debug)]
pub struct Config {
    /// The socket for the CLI.
    pub socket: PathBuf,
    /// Where `/metrics`, `/readyz` and `/healthz` answer.
    pub listen: SocketAddr,
}

/// Both listeners, bound and not yet served.
#[derive(Debug)]
pub struct Server {
    socket: BoundSocket,
    unix: UnixListener,
    tcp: TcpListener,
    /// Connections to the socket, and to the port.
    rooms: [Room; 2],
}

impl Server {
    /// Binds both listeners. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// If the TCP address is taken, another daemon answers on the socket, or the socket's path cannot be used. The
    /// error names the address or path.
    pub fn bind(config: &Config) -> io::Result<Self> {
        let tcp = std::net::TcpListener::bind(config.listen)
            .and_then(|listener| {
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)
            })
            .map_err(|error| context(&error, &format!("metrics address {}", config.listen)))?;
        let (listener, socket) = socket::bind(&config.socket)
            .map_err(|error| context(&error, &format!("admin socket {}", config.socket.display())))?;
        listener.set_nonblocking(true)?;
        let rooms =
            [Room::new("admin_socket_connections", CONNECTIONS), Room::new("admin_port_connections", CONNECTIONS)];
        Ok(Self { socket, unix: UnixListener::from_std(listener)?, tcp, rooms })
    }

    /// Where metrics are served; the port is the real one where the configuration said 0.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn metrics_address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// How full it is, now and whenever it is asked again.
    pub fn levels(&self) -> impl Fn() -> Vec<Level> + Send + Sync + 'static {
        let rooms = self.rooms.clone();
        move || rooms.iter().map(Room::level).collect()
    }

    #[must_use]
    pub fn socket_path(&self) -> &Path {
        self.socket.path()
    }

    /// Answers until `stop` is cancelled, lets requests that run finish, and removes the socket.
    pub async fn serve(self, sources: Sources, stop: CancellationToken) {
        let process = Process { metrics: sources.metrics.clone(), not_ready: sources.not_ready.clone() };
        let accepts = sources.metrics.accepts().clone();
        self.serve_routes(rows::router(sources), pages::router(process), &accepts, stop).await;
    }

    /// [`Self::serve`] for a process that is a certificate authority and nothing else.
    pub async fn serve_authority(self, sources: AuthoritySources, stop: CancellationToken) {
        let AuthoritySources { metrics, not_ready, authority } = sources;
        let accepts = metrics.accepts().clone();
        let public = pages::router(Process { metrics, not_ready });
        self.serve_routes(rows::authority_router(authority), public, &accepts, stop).await;
    }

    async fn serve_routes(self, local: Router, public: Router, accepts: &AcceptFailures, stop: CancellationToken) {
        let Self { socket, unix, tcp, rooms: [socket_room, port_room] } = self;
        let accept = || async { unix.accept().await.map(|(stream, _)| stream) };
        let failed = |reason| accepts.count("admin_socket", reason);
        let on_socket = accept_loop(accept, Acceptor::new(failed), socket_room, local, &stop);
        let accept = || async { tcp.accept().await.map(|(stream, _)| stream) };
        let failed = |reason| accepts.count("admin_port", reason);
        let on_port = accept_loop(accept, Acceptor::new(failed), port_room, public, &stop);
        tokio::join!(on_socket, on_port);
        drop(socket);
    }
}

async fn accept_loop<S, A, F>(
    accept: impl Fn() -> A,
    mut acceptor: Acceptor<F>,
    room: Room,
    router: Router,
    stop: &CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Future<Output = io::Result<S>>,
    F: Fn(&'static str),
{
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (place, stream) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = async {
                // No place, no accept: further clients wait in the kernel's backlog, which is bounded too.
                let place = room.enter().await;
                (place, acceptor.next(&accept).await)
            } => accepted,
        };
        let router = router.clone();
        let stop = stop.clone();
        connections.spawn(async move {
            serve_connection(stream, router, stop).await;
            drop(place);
        });
    }
    while connections.join_next().await.is_some() {}
}

async fn serve_connection<S>(stream: S, router: Router, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(REQUEST_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
        () = tokio::time::sleep(CONNECTION_LIFETIME) => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(REQUEST_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an admin connection broke off");
    }
}

fn context(error: &io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
