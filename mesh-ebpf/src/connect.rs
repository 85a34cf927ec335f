//! cgroup/connect4 and connect6: captures a workload's connects to meshed destinations.
//!
//! The hook runs before route look-up and before the source port is chosen: virtual addresses need no route in the
//! workload's namespace, and the record is keyed by the socket until sock_ops knows the source port.

use crate::context::{self, Family};
use crate::emit;
use crate::host::{self, Caller};
use crate::maps::{self, ORIG};
use aya_ebpf::bindings::BPF_SK_STORAGE_GET_F_CREATE;
use aya_ebpf::helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns,
};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::addr::{Endpoint, Ip};
use mesh_common::capture::{self, Call, Draw, EACCES, ECONNREFUSED, Refusal, Target, Verdict};
use mesh_common::event::VerdictRecord;
use mesh_common::flow::OriginalDestination;
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::AUTHENTICATED;
use mesh_common::policy::{self, Arrival, Mode};
use mesh_common::service::{CidrAction, Frontend, Pod};

/// Decides about a connect() and, if it is captured, rewrites it.
#[inline(always)]
pub(crate) fn decide<F: Family>(ctx: &SockAddrContext) -> Result<Verdict, Refusal> {
    // SAFETY: a plain helper call with the program's own context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    let Some(Caller { pod, cgroup, is_handed }) = caller(ctx, netns_cookie) else {
        return Ok(Verdict::Pass(Outcome::ConnectNotWorkload));
    };
    let destination = F::address(ctx);
    let port_be = context::port_be(ctx);
    let call = Call { protocol: context::protocol(ctx), mark: context::mark(ctx), destination };
    if let Some(outcome) = capture::exemption(&call, &pod, maps::setting(CfgSlot::OwnMark) as u32) {
        return Ok(Verdict::Pass(outcome));
    }
    let (target, drawn) = match maps::frontend(destination, port_be) {
        Some(frontend) => (Target::from_frontend(&frontend)?, draw(&frontend, destination, port_be)),
        None => {
            let action = maps::range(destination);
            match Target::from_range(action, port_be) {
                Ok(target) => (target, direct(action, destination, port_be)),
                Err(outcome) => return Ok(Verdict::Pass(outcome)),
            }
        }
    };
    if is_handed {
        return Err(Refusal { outcome: Outcome::ConnectHanded, errno: EACCES });
    }
    let now = now();
    let carried = carried::<F>(ctx, &pod, &target, &drawn, destination, now);
    let ruled = carried.map_or(Ruled::by_daemon(&target), |(_, ruled)| ruled);
    // Before the daemon is looked for: a workload that fails open is held to policy nevertheless.
    authorize(&pod, netns_cookie, &ruled, destination, port_be)?;
    let verdict = match carried {
        Some((backend, _)) => Verdict::Carry(backend),
        None => capture::capture(destination, &pod, daemon_is_silent(now))?,
    };
    let (to, flags) = match verdict {
        Verdict::Carry(backend) => (backend, OriginalDestination::CARRIED),
        Verdict::Capture(listener) => {
            let announced = pod.flags() & Pod::HOST_NETWORK != 0;
            let announced = if announced { OriginalDestination::ANNOUNCED } else { 0 };
            let elsewhere = if matches!(drawn, Drawn::Elsewhere) { OriginalDestination::ELSEWHERE } else { 0 };
            (Endpoint::new(listener, pod.outbound_port_be()), announced | elsewhere)
        }
        Verdict::Pass(_) => return Ok(verdict),
    };
    let original = OriginalDestination::new(
        now,
        netns_cookie,
        cgroup,
        destination,
        caller_pid(),
        target.service,
        port_be,
        F::AF,
        pod.outbound_port_be(),
        flags,
    );
    remember(ctx, &original)?;
    rewrite::<F>(ctx, to.ip(), to.port().to_be());
    emit::trace!(ctx, "rewritten {:i}:{}", destination.octets(), u16::from_be(port_be));
    Ok(verdict)
}

/// Where the kernel would carry a connect to, if it is right for that.
#[derive(Clone, Copy)]
enum Drawn {
    Nowhere,
    Elsewhere,
    Here(Endpoint),
}

/// Whose rules a connect is held to.
#[derive(Clone, Copy)]
struct Ruled {
    mode: Mode,
    group: u32,
    /// The port that the rules see, network byte order.
    port_be: u16,
    service: u32,
}

impl Ruled {
    #[inline(always)]
    const fn by_daemon(target: &Target) -> Self {
        Self { mode: Mode::Strict, group: target.group, port_be: target.port_be, service: target.service }
    }
}

#[inline(always)]
fn draw(frontend: &Frontend, destination: Ip, port_be: u16) -> Drawn {
    // SAFETY: a plain helper call.
    match capture::draw(frontend, unsafe { bpf_get_prandom_u32() }) {
        Draw::Nowhere => Drawn::Nowhere,
        Draw::Elsewhere => Drawn::Elsewhere,
        Draw::Here(point) => {
            let slot = |slot| maps::backend(destination, port_be, slot);
            let found = capture::backend_at(frontend.local_slots(), point, slot);
            found.map_or(Drawn::Nowhere, |backend| Drawn::Here(backend.endpoint()))
        }
    }
}

/// A workload that is called by its own address needs no draw.
#[inline(always)]
fn direct(action: Option<CidrAction>, destination: Ip, port_be: u16) -> Drawn {
    match action {
        Some(action) if action.is_carried() => Drawn::Here(Endpoint::new(destination, port_be)),
        _ => Drawn::Nowhere,
    }
}

/// The backend that the kernel carries this connect to, and whose rules hold there: those by which its guard decides.
/// Without a guard nothing is carried, nor to a backend that fails, nor from a socket that is bound to who knows what.
#[inline(always)]
fn carried<F: Family>(
    ctx: &SockAddrContext,
    pod: &Pod,
    target: &Target,
    drawn: &Drawn,
    destination: Ip,
    now: u64,
) -> Option<(Endpoint, Ruled)> {
    let Drawn::Here(backend) = *drawn else { return None };
    if !capture::is_plain_source(F::bound(ctx), capture::own_address(pod, destination)) {
        return None;
    }
    let guard = maps::app_port(backend.ip(), backend.port().to_be())?;
    if maps::failing_until(&backend) > now {
        return None;
    }
    let mode = Mode::from_number(guard.mode());
    Some((backend, Ruled { mode, group: guard.group(), port_be: backend.port().to_be(), service: target.service }))
}

/// Which workload calls: its network namespace says it, or in the node's own its cgroup.
#[inline(always)]
fn caller(ctx: &SockAddrContext, netns_cookie: u64) -> Option<Caller> {
    if let Some(pod) = maps::pod(netns_cookie) {
        return Some(Caller { pod, cgroup: caller_cgroup(), is_handed: false });
    }
    host::caller(context::socket(ctx), netns_cookie)
}

/// Refuses at once what the destination would refuse later. It is a courtesy: what the kernel cannot tell here, or a
/// process gets around, is decided at the destination.
#[inline(always)]
fn authorize(pod: &Pod, netns_cookie: u64, ruled: &Ruled, destination: Ip, port_be: u16) -> Result<(), Refusal> {
    if ruled.group == 0 {
        return Ok(());
    }
    let (group, identity) = (ruled.group, pod.identity());
    let source = capture::own_address(pod, destination);
    let sources = [AUTHENTICATED, identity, maps::class(group, source)];
    let matched = policy::join(group, sources, ruled.port_be, maps::matched);
    let decision = policy::decide(Some(ruled.mode), Arrival::Authenticated, &matched);
    let answer = capture::denied(&decision, maps::setting(CfgSlot::DeniedErrno));
    if let Err(Refusal { outcome, .. }) = answer {
        emit::verdict(&VerdictRecord::new(
            now(),
            netns_cookie,
            source,
            destination,
            outcome as u32,
            group,
            identity,
            decision.rule,
            caller_pid(),
            ruled.service,
            0,
            port_be,
        ));
    }
    answer
}

/// Forgets what an earlier connect() of this socket recorded: after connect(AF_UNSPEC) a captured socket may go
/// somewhere unmeshed, and must then be what it says it is.
#[inline(always)]
pub(crate) fn forget(ctx: &SockAddrContext) {
    // SAFETY: the map and the socket are valid for the program's run. It fails if nothing was recorded: the usual case.
    let _none_recorded =
        unsafe { bpf_sk_storage_delete((&raw const ORIG).cast_mut().cast(), context::socket(ctx).cast()) };
}

#[inline(always)]
pub(crate) fn remember(ctx: &SockAddrContext, original: &OriginalDestination) -> Result<(), Refusal> {
    // SAFETY: the map and the socket are valid for the program's run; a null initial value means zeroed.
    let storage = unsafe {
        bpf_sk_storage_get(
            (&raw const ORIG).cast_mut().cast(),
            context::socket(ctx).cast(),
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    }
    .cast::<OriginalDestination>();
    if storage.is_null() {
        return Err(Refusal { outcome: Outcome::ConnectStorageFull, errno: ECONNREFUSED });
    }
    // Written in any case: the storage of an earlier connect() is found, not made.
    // SAFETY: not null, so it is this socket's storage: one aligned record. The socket is locked by connect().
    unsafe { storage.write(*original) };
    Ok(())
}

#[inline(always)]
fn rewrite<F: Family>(ctx: &SockAddrContext, listener: Ip, port_be: u16) {
    F::set_address(ctx, listener);
    context::set_port_be(ctx, port_be);
}

#[inline(always)]
pub(crate) fn daemon_is_silent(now: u64) -> bool {
    let heartbeat = maps::setting(CfgSlot::Heartbeat);
    capture::heartbeat_is_stale(now, heartbeat, maps::setting(CfgSlot::HeartbeatTimeout))
}

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: a plain helper call.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn caller_cgroup() -> u64 {
    // SAFETY: a plain helper call.
    unsafe { bpf_get_current_cgroup_id() }
}

#[inline(always)]
pub(crate) fn caller_pid() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}
