//! The authority's port: TLS, a bounded number of connections, each bounded in time.

use super::routes::{Caller, router};
use super::service::Service;
use crate::runtime::{Acceptor, Level, Place, Room};
use crate::telemetry::bounds::AcceptFailures;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// The port of certificate authorities.
pub const DEFAULT_PORT: u16 = 9416;
/// Connections at a time.
const CONNECTIONS: usize = 512;
/// Connections at a time from one address.
const CONNECTIONS_PER_ADDRESS: usize = 64;
/// From accept to the end of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// From the handshake, or from the last answer, to the end of the next request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// What a connection may take in all.
const CONNECTION_LIFETIME: Duration = Duration::from_mins(2);
/// What open connections get when the authority stops.
const DRAIN: Duration = Duration::from_secs(5);

/// The listeners, bound and not yet served.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<TcpListener>,
    door: Arc<Door>,
    accepts: AcceptFailures,
}

impl Server {
    /// Binds every address. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// If one cannot be bound; the error names it.
    pub fn bind(listen: &[SocketAddr], accepts: AcceptFailures) -> io::Result<Self> {
        let bind = |address: &SocketAddr| {
            std::net::TcpListener::bind(address)
                .and_then(|listener| {
                    listener.set_nonblocking(true)?;
                    TcpListener::from_std(listener)
                })
                .map_err(|error| io::Error::new(error.kind(), format!("CA address {address}: {error}")))
        };
        let listeners = listen.iter().map(bind).collect::<Result<_, _>>()?;
        let door = Door { places: Room::new("authority_connections", CONNECTIONS), by_address: Mutex::default() };
        Ok(Self { listeners, door: Arc::new(door), accepts })
    }

    /// Where it listens; the ports are the real ones where 0 was asked for.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// How full it is, now and whenever it is asked again.
    pub fn levels(&self) -> impl Fn() -> Vec<Level> + Send + Sync + 'static {
        let door = self.door.clone();
        move || vec![door.places.level()]
    }

    /// Answers, and does what is due, until `stop` is cancelled; lets requests that run finish.
    pub async fn serve(self, service: Arc<Service>, stop: CancellationToken) {
        let mut loops = JoinSet::new();
        for listener in self.listeners {
            loops.spawn(accept_loop(listener, self.accepts.clone(), service.clone(), self.door.clone(), stop.clone()));
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = service.keep() => {}
        }
        while loops.join_next().await.is_some() {}
    }
}

async fn accept_loop(
    listener: TcpListener,
    accepts: AcceptFailures,
    service: Arc<Service>,
    door: Arc<Door>,
    stop: CancellationToken,
) {
    let mut acceptor = Acceptor::new(|reason| accepts.count("authority", reason));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, address) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = acceptor.next(|| listener.accept()) => accepted,
        };
        // One address cannot take every place, and nobody waits behind a crowd: too many are turned away.
        let Some(admission) = Admission::take(&door, address.ip()) else {
            tracing::debug!(%address, "too many connections to the certificate authority");
            continue;
        };
        let (service, stop) = (service.clone(), stop.clone());
        connections.spawn(async move {
            let _admission = admission;
            let served = tokio::time::timeout(CONNECTION_LIFETIME, serve(stream, address, service, stop));
            if let Ok(Err(error)) = served.await {
                tracing::debug!(%address, %error, "a connection to the certificate authority broke off");
            }
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn serve(
    stream: TcpStream,
    address: SocketAddr,
    service: Arc<Service>,
    stop: CancellationToken,
) -> io::Result<()> {
    let acceptor = TlsAcceptor::from(service.server_config());
    let stream = tokio::select! {
        shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)) => shaken??,
        () = stop.cancelled() => return Ok(()),
    };
    let leaf =
        stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).map(|leaf| leaf.clone().into_owned());
    let service = TowerToHyperService::new(router(Caller { service, address, leaf }));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(DRAIN, connection).await.unwrap_or(Ok(()))
        }
    };
    ended.map_err(io::Error::other)
}

/// Counts who is inside.
#[derive(Debug)]
struct Door {
    places: Room,
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

/// Lets a connection in; out again when dropped.
struct Admission {
    door: Arc<Door>,
    address: IpAddr,
    _place: Place,
}

impl Admission {
    fn take(door: &Arc<Door>, address: IpAddr) -> Option<Self> {
        let mut by_address = door.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if by_address.get(&address).is_some_and(|count| *count >= CONNECTIONS_PER_ADDRESS) {
            return None;
        }
        let place = door.places.try_enter()?;
        *by_address.entry(address).or_default() += 1;
        Some(Self { door: door.clone(), address, _place: place })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut by_address = self.door.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}
