//! Connecting to applications from inside their namespaces, announced to the kernel.

use super::registry::Delivery;
use super::{Context, Failure, LocalWorkload};
use crate::datapath::Bypass;
use crate::netns::{Namespaces, Parting};
use mesh_common::service::BypassKey;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};

/// Looks at the sockets of an application that may be ending: a process that dies closes its listener last.
const LOOKS: usize = 4;
/// Between them.
const PAUSE: Duration = Duration::from_millis(15);

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
    ) -> Result<(TcpStream, Delivery), Failure> {
        let from = SocketAddr::new(local.delivers_from(source.ip(), destination.ip()), 0);
        // The mark is for the routing that is made in workloads' own namespaces.
        let mark = if local.workload.is_host_network() { 0 } else { self.mark };
        let dialled = self.namespaces.dial_socket(&local.namespace, from, mark).await;
        let socket = dialled.map_err(Failure::Application)?;
        let bound = socket.local_addr().map_err(Failure::Application)?.as_socket().map_or(0, |address| address.port());
        let pass = BypassKey::new(from.ip().into(), destination.ip().into(), bound.to_be(), destination.port().to_be());
        let delivery = self.context.registry.delivering(SocketAddr::new(from.ip(), bound), destination);
        // sk_lookup runs once, on the SYN: the pass is needed until connect() has answered and no longer.
        let _pass = self.bypass.admit(pass).map_err(Failure::Application)?;
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(destination);
        let app = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| Failure::ApplicationTimeout)?
            .map_err(Failure::Application)?;
        app.set_nodelay(true).map_err(Failure::Application)?;
        Ok((app, delivery))
    }

    /// Whether an application has closed its end of a connection and takes no others at that address. `false` where that
    /// cannot be told.
    pub(super) async fn is_deserted(&self, local: &LocalWorkload, application: SocketAddr, own: SocketAddr) -> bool {
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
