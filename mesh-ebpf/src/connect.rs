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
use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_netns_cookie, bpf_ktime_get_ns};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::addr::Ip;
use mesh_common::capture::{self, Call, EACCES, ECONNREFUSED, Refusal, Target, Verdict};
use mesh_common::event::VerdictRecord;
use mesh_common::flow::OriginalDestination;
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::AUTHENTICATED;
use mesh_common::policy::{self, Arrival, Mode};
use mesh_common::service::Pod;

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
    let target = match maps::frontend(destination, port_be) {
        Some(frontend) => Target::from_frontend(&frontend)?,
        None => match Target::from_range(maps::range(destination), port_be) {
            Ok(target) => target,
            Err(outcome) => return Ok(Verdict::Pass(outcome)),
        },
    };
    if is_handed {
        return Err(Refusal { outcome: Outcome::ConnectHanded, errno: EACCES });
    }
    // Before the daemon is looked for: a workload that fails open is held to policy nevertheless.
    authorize(&pod, netns_cookie, &target, destination, port_be)?;
    let now = now();
    let verdict = capture::capture(destination, &pod, daemon_is_silent(now))?;
    if let Verdict::Capture(listener) = verdict {
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
            if pod.flags() & Pod::HOST_NETWORK == 0 { 0 } else { OriginalDestination::ANNOUNCED },
        );
        remember(ctx, &original)?;
        rewrite::<F>(ctx, listener, pod.outbound_port_be());
        emit::trace!(ctx, "captured {:i}:{}", destination.octets(), u16::from_be(port_be));
    }
    Ok(verdict)
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
fn authorize(pod: &Pod, netns_cookie: u64, target: &Target, destination: Ip, port_be: u16) -> Result<(), Refusal> {
    if target.group == 0 {
        return Ok(());
    }
    let (group, identity) = (target.group, pod.identity());
    let source = capture::own_address(pod, destination);
    let sources = [AUTHENTICATED, identity, maps::class(group, source)];
    let matched = policy::join(group, sources, target.port_be, maps::matched);
    let decision = policy::decide(Some(Mode::Strict), Arrival::Authenticated, &matched);
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
            target.service,
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
