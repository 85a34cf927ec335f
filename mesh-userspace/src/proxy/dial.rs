//! Connecting to applications from inside their namespaces, announced to the kernel.

use super::registry::Delivery;
use super::{Context, Failure, LocalWorkload};
use crate::datapath::Bypass;
use crate::netns::{Namespaces, Parting};
use mesh_common::service::BypassKey;
use socket2::Socket;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};

/// Looks at the sockets of an application that may be ending: a process that dies closes its listener last.
const LOOKS: usize = 4;
/// Between them.
const PAUSE: Duration = Duration::from_millis(15);
/// Looks at a time, each with a descriptor of its own: when an application dies, all its connections end at once.
pub const LOOKERS: usize = 64;
/// Ports tried, one after the other, once the kernel says that none is free: named, a port may be shared by connections
/// that lead elsewhere, but which ones those are only connect() tells.
const PORTS_TRIED: u16 = 128;

/// Reaches the applications of this node.
#[derive(Clone)]
pub struct Dialler {
    pub context: Arc<Context>,
    pub namespaces: Namespaces,
    pub bypass: Bypass,
    /// SO_MARK of sockets made inside workloads' namespaces.
    pub mark: u32,
}

impl Dialler {
    /// Connects to an application, with the client's address where that is possible.
    pub(super) async fn dial(
        &self,
        local: &LocalWorkload,
        source: SocketAddr,
        destination: SocketAddr,
        timeout: Duration,
    ) -> Result<Box<Dialled>, Failure> {
        let from = SocketAddr::new(local.delivers_from(source.ip(), destination.ip()), 0);
        // The mark is for the routing that is made in workloads' own namespaces.
        let mark = if local.workload.is_host_network() { 0 } else { self.mark };
        let free = self.namespaces.dial_socket(&local.namespace, from, mark).await;
        let mut outcome = self.connect(free, from, destination, timeout).await;
        let first: u16 = rand::random();
        for tried in 0..PORTS_TRIED {
            let Err(Miss::PortTaken) = outcome else { break };
            let choice = first.wrapping_add(tried);
            let shared = self.namespaces.dial_shared(&local.namespace, from, mark, choice).await;
            outcome = self.connect(shared, from, destination, timeout).await;
        }
        outcome.map_err(|miss| match miss {
            Miss::PortTaken => Failure::PortsExhausted,
            Miss::Failed(failure) => failure,
        })
    }

    /// Connects a socket that is bound, announcing it to the kernel.
    async fn connect(
        &self,
        bound: io::Result<Socket>,
        from: SocketAddr,
        destination: SocketAddr,
        timeout: Duration,
    ) -> Result<Box<Dialled>, Miss> {
        let socket = bound.map_err(Miss::at_bind)?;
        let unreachable = |error| Miss::Failed(Failure::Application(error));
        let port = socket.local_addr().map_err(unreachable)?.as_socket().map_or(0, |address| address.port());
        // Connections of the daemon's own need not be tried: their entries are theirs.
        let delivery = self.context.registry.delivering(SocketAddr::new(from.ip(), port), destination);
        let delivery = delivery.ok_or(Miss::PortTaken)?;
        let pass = BypassKey::new(from.ip().into(), destination.ip().into(), port.to_be(), destination.port().to_be());
        // sk_lookup runs once, on the SYN: the pass is needed until connect() has answered and no longer.
        let _pass = self.bypass.admit(pass).map_err(unreachable)?;
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(destination);
        let app = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| Miss::Failed(Failure::ApplicationTimeout))?
            .map_err(Miss::at_connect)?;
        app.set_nodelay(true).map_err(unreachable)?;
        let own = app.local_addr().map_err(unreachable)?;
        Ok(Box::new(Dialled { app, own, _delivery: delivery }))
    }

    /// Whether an application has closed its end of a connection and takes no others at that address. `false` where that
    /// cannot be told.
    pub(super) async fn is_deserted(&self, local: &LocalWorkload, application: SocketAddr, own: SocketAddr) -> bool {
        let _place = self.context.looks.enter().await;
        let Ok(table) = self.namespaces.sockets(&local.namespace).await else { return false };
        let table = Arc::new(table);
        for look in 1..=LOOKS {
            let table = table.clone();
            // The kernel walks its listeners for this.
            match tokio::task::spawn_blocking(move || table.parting(application, own)).await {
                Ok(Ok(Parting::Deserted)) => return true,
                Ok(Ok(Parting::Closed)) if look < LOOKS => tokio::time::sleep(PAUSE).await,
                _ => return false,
            }
        }
        false
    }
}

/// A connection to an application. It counts as the daemon's own for as long as this lives.
pub(super) struct Dialled {
    pub(super) app: TcpStream,
    /// This daemon's end.
    pub(super) own: SocketAddr,
    _delivery: Delivery,
}

/// Why one port did not do.
enum Miss {
    /// Another connection from the same address to the application has it.
    PortTaken,
    Failed(Failure),
}

impl Miss {
    fn at_bind(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::AddrInUse => Self::PortTaken,
            // AddrNotAvailable says here that the address is not the machine's.
            _ => Self::Failed(Failure::Application(error)),
        }
    }

    fn at_connect(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable => Self::PortTaken,
            _ => Self::Failed(Failure::Application(error)),
        }
    }
}
