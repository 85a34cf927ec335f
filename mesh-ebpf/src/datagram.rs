//! UDP in the cgroup's hooks: connect4/6 and sendmsg4/6 redirect to an alias what a workload sends to a UDP port of the
//! mesh, and what it answers to a caller whose datagrams the daemon delivers; recvmsg4/6 shows whom an alias stands for.
//! See `mesh_common::datagram`.

use crate::connect;
use crate::context::{self, Family};
use crate::maps;
use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_get_netns_cookie};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::addr::{Endpoint, Ip};
use mesh_common::capture::{self, Refusal};
use mesh_common::datagram;
use mesh_common::flow::OriginalDestination;
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::AUTHENTICATED;
use mesh_common::policy::{self, Arrival, Mode};
use mesh_common::service::{BypassKey, DatagramFrontend, Pod};

/// Where a datagram goes instead.
struct Redirection {
    alias: Endpoint,
    service: u32,
    outcome: Outcome,
}

/// Decides about connect() of a UDP socket: what it sends afterwards comes by no other hook.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> Result<Outcome, Refusal> {
    let (destination, port_be) = (F::address(ctx), context::port_be(ctx));
    let netns_cookie = netns_cookie(ctx);
    let redirection = match find(ctx, netns_cookie, destination, port_be, Outcome::DatagramConnected)? {
        Ok(redirection) => redirection,
        Err(left_alone) => return Ok(left_alone),
    };
    let original = OriginalDestination::new(
        connect::now(),
        netns_cookie,
        // SAFETY: a plain helper call.
        unsafe { bpf_get_current_cgroup_id() },
        destination,
        connect::caller_pid(),
        redirection.service,
        port_be,
        F::AF,
        redirection.alias.port_be(),
        0,
    );
    connect::remember(ctx, &original)
        .map_err(|refusal| Refusal { outcome: Outcome::DatagramStorageFull, errno: refusal.errno })?;
    rewrite::<F>(ctx, &redirection.alias);
    Ok(redirection.outcome)
}

/// Decides about a datagram that names its destination.
#[inline(always)]
pub(crate) fn send<F: Family>(ctx: &SockAddrContext) -> Result<Outcome, Refusal> {
    let (destination, port_be) = (F::address(ctx), context::port_be(ctx));
    match find(ctx, netns_cookie(ctx), destination, port_be, Outcome::DatagramSent)? {
        Ok(redirection) => {
            rewrite::<F>(ctx, &redirection.alias);
            Ok(redirection.outcome)
        }
        Err(left_alone) => Ok(left_alone),
    }
}

/// Shows a received datagram's source as whom it stands for; `None`: it stands for itself.
#[inline(always)]
pub(crate) fn receive<F: Family>(ctx: &SockAddrContext) -> Option<Outcome> {
    let real = maps::alias(&Endpoint::new(F::address(ctx), context::port_be(ctx)))?;
    // Elsewhere an alias is an address like any other.
    maps::pod(netns_cookie(ctx))?;
    rewrite::<F>(ctx, &real);
    Some(Outcome::AliasResolved)
}

/// What is to be done with a datagram; the inner error: it is left alone, and why.
#[inline(always)]
fn find(
    ctx: &SockAddrContext,
    netns_cookie: u64,
    destination: Ip,
    port_be: u16,
    captured: Outcome,
) -> Result<Result<Redirection, Outcome>, Refusal> {
    let Some(pod) = maps::pod(netns_cookie) else {
        return Ok(Err(Outcome::DatagramNotWorkload));
    };
    let own_mark = maps::setting(CfgSlot::OwnMark) as u32;
    if let Some(left_alone) = datagram::exemption(context::mark(ctx), destination, &pod, own_mark) {
        return Ok(Err(left_alone));
    }
    let Some(frontend) = maps::datagram_frontend(destination, port_be) else {
        return Ok(answer(ctx, &pod, destination, port_be).ok_or(Outcome::DatagramUnmeshed));
    };
    datagram::answered(&frontend)?;
    // Before the daemon is looked for: a workload that fails open is held to policy nevertheless.
    authorize(&pod, &frontend, destination)?;
    match datagram::redirect(&pod, destination, &frontend, connect::daemon_is_silent(connect::now()))? {
        None => Ok(Err(Outcome::DatagramFailOpen)),
        Some(alias) => {
            let alias = Endpoint::new(alias, pod.outbound_port_be());
            Ok(Ok(Redirection { alias, service: frontend.service(), outcome: captured }))
        }
    }
}

/// The daemon's socket for the caller that a workload answers, if it is one whose datagrams the daemon delivers.
#[inline(always)]
fn answer(ctx: &SockAddrContext, pod: &Pod, caller: Ip, caller_port_be: u16) -> Option<Redirection> {
    let own = capture::own_address(pod, caller);
    let alias = maps::caller(&BypassKey::new(caller, own, caller_port_be, context::local_port_be(ctx)))?;
    Some(Redirection { alias, service: 0, outcome: Outcome::DatagramReplied })
}

#[inline(always)]
fn authorize(pod: &Pod, frontend: &DatagramFrontend, destination: Ip) -> Result<(), Refusal> {
    let group = frontend.group();
    if group == 0 {
        return Ok(());
    }
    let source = capture::own_address(pod, destination);
    let sources = [AUTHENTICATED, pod.identity(), maps::class(group, source)];
    let matched = policy::join(group, sources, frontend.target_port_be(), maps::matched);
    let decision = policy::decide(Some(Mode::Strict), Arrival::Authenticated, &matched);
    datagram::denied(&decision, maps::setting(CfgSlot::DeniedErrno))
}

#[inline(always)]
fn rewrite<F: Family>(ctx: &SockAddrContext, to: &Endpoint) {
    F::set_address(ctx, to.ip());
    context::set_port_be(ctx, to.port_be());
}

#[inline(always)]
fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a plain helper call with the program's own context.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }
}
