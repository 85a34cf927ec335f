//! The destination's side: an authenticated flow is delivered to a workload of this node.

use super::life::Life;
use super::outbound::over;
use super::{Common, Datagrams, send};
use crate::datapath::Introduction;
use crate::netns::{AliasRange, receive_from_application};
use crate::proxy::inbound::{Admitted, Inbound};
use crate::proxy::registry::Ticket;
use crate::proxy::session::Session;
use crate::proxy::{Failure, LocalWorkload};
use crate::tunnel::{Incoming, Refusal, ResetCode, Sink, StreamError, TlsSession};
use mesh_common::service::BypassKey;
use mesh_common::{Endpoint, datagram};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::UdpSocket;

/// The way to the application.
struct Delivery {
    socket: Arc<UdpSocket>,
    /// Has the application see the caller, in a pod.
    _introduction: Option<Introduction>,
}

impl Inbound {
    /// Carries a flow of datagrams that has entered the registry.
    pub(in crate::proxy) async fn carry_datagrams(&self, incoming: Incoming, admitted: Admitted) {
        let Datagrams(common) = &self.datagrams;
        let session = Arc::new(self.begin(&incoming, &admitted));
        let open = common.inbound.opened();
        let place = common.inbound_room.try_enter();
        let judged = match &place {
            Some(_) => self.judge(&incoming, &admitted, &session),
            None => Err(Failure::Refused(Refusal::Overloaded)),
        };
        // The snapshot is held no longer than the decision: a flow may last for days.
        let Admitted { local, mut ticket, .. } = admitted;
        let outcome = match judged {
            Ok(_held) => self.deliver_datagrams(common, incoming, &local, &session, &mut ticket).await,
            Err(failure) => {
                incoming.refuse(failure.refusal());
                Err(failure)
            }
        };
        drop(open);
        if let Err(failure) = &outcome {
            session.fail(failure);
        }
        common.inbound.closed(outcome.as_ref().map_or_else(Failure::reason, |()| "idle"));
    }

    async fn deliver_datagrams(
        &self,
        common: &Arc<Common>,
        incoming: Incoming,
        local: &LocalWorkload,
        session: &Arc<Session>,
        ticket: &mut Ticket,
    ) -> Result<(), Failure> {
        let reached = self.reach(common, local, incoming.header.source, incoming.header.destination).await;
        let delivery = match reached {
            Ok(delivery) => delivery,
            Err(error) => {
                let failure = if error.kind() == ErrorKind::AddrInUse {
                    Failure::PortsExhausted
                } else {
                    Failure::Application(error)
                };
                incoming.refuse(failure.refusal());
                return Err(failure);
            }
        };
        let life = Arc::new(Life::new());
        let sink = sink(common, &delivery.socket, &life, session);
        let flow = incoming.accept_datagrams(sink).ok_or(Failure::Refused(Refusal::BadHeader))?;
        session.carried_over(flow.transport(), &TlsSession::default());
        let sender = flow.sender();
        let answers = async {
            loop {
                let received = receive_from_application(&delivery.socket, |payload| {
                    life.reply();
                    send(&common.inbound, &sender, payload, |metrics, bytes| {
                        metrics.reply(bytes);
                        session.reply(bytes);
                    });
                });
                if let Err(error) = received.await {
                    return error;
                }
            }
        };
        let (mut refused, mut cut) = (None, None);
        let carried = flow.carry(async {
            tokio::select! {
                error = answers => {
                    refused = Some(error);
                    ResetCode::CONNECTION_RESET
                }
                (code, why) = over(&life, ticket) => {
                    cut = why;
                    code
                }
                () = local.removed.cancelled() => ResetCode::CANCELLED,
            }
        });
        match (carried.await, cut, refused) {
            (_, Some(cut), _) => Err(Failure::Cut(cut)),
            (_, None, Some(error)) => Err(Failure::Application(error)),
            (_, None, None) if life.is_refused() => Err(Failure::Application(ErrorKind::ConnectionRefused.into())),
            (Ok(()) | Err(StreamError::Ended | StreamError::Reset(ResetCode::CANCELLED)), None, None) => Ok(()),
            (Err(error), None, None) => Err(Failure::Remote(error)),
        }
    }

    /// A socket in the workload's namespace that speaks to the application from an alias, and has the application see
    /// the caller behind it.
    async fn reach(
        &self,
        common: &Common,
        local: &LocalWorkload,
        caller: SocketAddr,
        application: SocketAddr,
    ) -> io::Result<Delivery> {
        if local.workload.is_host_network() {
            // Its namespace has no aliases: as for TCP, the application sees the node's own address.
            let own = application.ip();
            let socket = self.dialler.namespaces.deliver_datagrams(&local.namespace, own, application, 0).await?;
            return Ok(Delivery { socket: writable(socket).await?, _introduction: None });
        }
        let same_family = |range: &&AliasRange| range.own.is_ipv4() == application.is_ipv4();
        let range = local.aliases.iter().find(same_family).ok_or(ErrorKind::AddrNotAvailable)?;
        let alias = datagram::alias(range.range.network().into(), datagram::DELIVERY).into();
        let socket =
            self.dialler.namespaces.deliver_datagrams(&local.namespace, alias, application, self.dialler.mark).await?;
        let alias = socket.local_addr()?;
        let call = |port: u16| {
            let (remote, own) = (Endpoint::from(SocketAddr::new(caller.ip(), port)), Endpoint::from(application));
            BypassKey::new(remote.ip(), own.ip(), remote.port_be(), own.port_be())
        };
        // One socket may reach one port through two services: the second is seen under another port.
        for port in [caller.port(), alias.port()] {
            if let Some(introduction) = common.aliases.introduce(call(port), alias.into())? {
                let socket = writable(socket).await?;
                return Ok(Delivery { socket, _introduction: Some(introduction) });
            }
        }
        Err(ErrorKind::AddrInUse.into())
    }
}

/// A socket that takes datagrams from the first one on: until the runtime has heard of it from the kernel, an attempt to
/// send is answered with "would block", and what a caller sends right after it is told "opened" would be dropped.
async fn writable(socket: std::net::UdpSocket) -> io::Result<Arc<UdpSocket>> {
    let socket = UdpSocket::from_std(socket)?;
    socket.writable().await?;
    Ok(Arc::new(socket))
}

/// Hands the caller's datagrams to the application.
fn sink(common: &Arc<Common>, socket: &Arc<UdpSocket>, life: &Arc<Life>, session: &Arc<Session>) -> Sink {
    let (common, socket, life) = (Arc::clone(common), Arc::clone(socket), Arc::clone(life));
    let session = Arc::clone(session);
    Arc::new(move |payload| {
        life.request();
        match socket.try_send(payload) {
            Ok(_) => {
                common.inbound.request(payload.len());
                session.request(payload.len());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => common.inbound.dropped("application_full"),
            Err(error) => {
                common.inbound.dropped("application_gone");
                // The error was taken by this call: whoever reads will not hear of it.
                if error.kind() == ErrorKind::ConnectionRefused { life.refuse() } else { life.end() }
            }
        }
    })
}
