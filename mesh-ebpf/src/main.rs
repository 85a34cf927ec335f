//! nodemesh's eBPF programs: entry points only. Each one is an exhaustive match from its hook's decision to the
//! kernel's action; the decisions are in the modules, one per hook, and their pure parts in `mesh_common::capture`.
#![no_std]
#![no_main]
#![allow(clippy::needless_pass_by_value, reason = "the hooks' macros hand the context over by value")]

mod carried;
mod congestion;
mod connect;
mod context;
mod datagram;
mod datagram_guard;
mod emit;
mod getpeername;
mod host;
mod maps;
mod sk_lookup;
mod sock_ops;

use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, sk_lookup as sk_lookup_program, sock_ops as sock_ops_program};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockContext, SockOpsContext};
use context::{V4, V6};
use mesh_common::capture::{Refusal, Verdict};
use mesh_common::outcome::Outcome;
use mesh_common::policy;
use mesh_common::service::PROTO_UDP;

/// A cgroup/connect or cgroup/sock_create program's "go on".
const PROCEED: i32 = 1;
/// A cgroup/connect program's "fail": with the errno set before, else EPERM.
const FAIL: i32 = 0;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// socket(): remembers whose it is, where the network namespace does not say.
#[cgroup_sock(sock_create)]
pub(crate) fn mesh_sock_create(ctx: SockContext) -> i32 {
    match host::record_maker(&ctx) {
        Ok(()) => PROCEED,
        Err(outcome) => {
            emit::count(outcome);
            PROCEED
        }
    }
}

/// connect() of an AF_INET socket.
#[cgroup_sock_addr(connect4)]
pub(crate) fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    if is_datagram(&ctx) {
        return finish_datagram_connect(&ctx, datagram::connect::<V4>(&ctx));
    }
    finish_connect(&ctx, connect::decide::<V4>(&ctx))
}

/// connect() of an AF_INET6 socket, also to a v4-mapped address.
#[cgroup_sock_addr(connect6)]
pub(crate) fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    if is_datagram(&ctx) {
        return finish_datagram_connect(&ctx, datagram::connect::<V6>(&ctx));
    }
    finish_connect(&ctx, connect::decide::<V6>(&ctx))
}

#[inline(always)]
fn is_datagram(ctx: &SockAddrContext) -> bool {
    context::protocol(ctx) == u32::from(PROTO_UDP)
}

#[inline(always)]
fn finish_connect(ctx: &SockAddrContext, decision: Result<Verdict, Refusal>) -> i32 {
    match decision {
        Ok(Verdict::Capture(_)) => {
            emit::count(Outcome::ConnectCaptured);
            PROCEED
        }
        Ok(Verdict::Carry(_)) => {
            emit::count(Outcome::ConnectCarried);
            PROCEED
        }
        Ok(Verdict::Pass(outcome)) => {
            connect::forget(ctx);
            emit::count(outcome);
            PROCEED
        }
        Err(Refusal { outcome, errno }) => {
            connect::forget(ctx);
            emit::count(outcome);
            emit::set_errno(errno);
            FAIL
        }
    }
}

#[inline(always)]
fn finish_datagram_connect(ctx: &SockAddrContext, decision: Result<Outcome, Refusal>) -> i32 {
    if !matches!(decision, Ok(Outcome::DatagramConnected | Outcome::DatagramReplied)) {
        connect::forget(ctx);
    }
    finish_datagram(decision)
}

#[inline(always)]
fn finish_datagram(decision: Result<Outcome, Refusal>) -> i32 {
    match decision {
        Ok(outcome) => {
            emit::count(outcome);
            PROCEED
        }
        Err(Refusal { outcome, errno }) => {
            emit::count(outcome);
            emit::set_errno(errno);
            FAIL
        }
    }
}

/// sendto() or sendmsg() with a destination, of an AF_INET UDP socket or to a v4-mapped address.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn mesh_sendmsg4(ctx: SockAddrContext) -> i32 {
    finish_datagram(datagram::send::<V4>(&ctx))
}

/// sendto() or sendmsg() with a destination, of an AF_INET6 UDP socket.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn mesh_sendmsg6(ctx: SockAddrContext) -> i32 {
    finish_datagram(datagram::send::<V6>(&ctx))
}

/// recvfrom() or recvmsg() that asks for the source, of an AF_INET UDP socket.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn mesh_recvmsg4(ctx: SockAddrContext) -> i32 {
    finish_answer(datagram::receive::<V4>(&ctx))
}

/// recvfrom() or recvmsg() that asks for the source, of an AF_INET6 UDP socket, also from a v4-mapped address.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn mesh_recvmsg6(ctx: SockAddrContext) -> i32 {
    finish_answer(datagram::receive::<V6>(&ctx))
}

/// getpeername() of an AF_INET socket.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn mesh_getpeername4(ctx: SockAddrContext) -> i32 {
    finish_answer(getpeername::answer::<V4>(&ctx))
}

/// getpeername() of an AF_INET6 socket.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn mesh_getpeername6(ctx: SockAddrContext) -> i32 {
    finish_answer(getpeername::answer::<V6>(&ctx))
}

#[inline(always)]
fn finish_answer(answer: Option<Outcome>) -> i32 {
    match answer {
        Some(outcome) => {
            emit::count(outcome);
            PROCEED
        }
        None => PROCEED,
    }
}

/// A socket's life: hands captured connections to the daemon and reports their end.
#[sock_ops_program]
pub(crate) fn mesh_sock_ops(ctx: SockOpsContext) -> u32 {
    // The program cannot veto anything; 1 leaves every default of the kernel in place.
    match sock_ops::observe(&ctx) {
        Ok(Some(outcome)) | Err(outcome) => {
            emit::count(outcome);
            1
        }
        Ok(None) => 1,
    }
}

/// A new connection reaches a workload's network namespace.
#[sk_lookup_program]
pub(crate) fn mesh_sk_lookup(ctx: SkLookupContext) -> u32 {
    finish_lookup(sk_lookup::decide::<false>(&ctx))
}

/// A new connection reaches the node's own network namespace.
#[sk_lookup_program]
pub(crate) fn mesh_node_lookup(ctx: SkLookupContext) -> u32 {
    finish_lookup(sk_lookup::decide::<true>(&ctx))
}

#[inline(always)]
fn finish_lookup((verdict, outcome): (policy::Verdict, Outcome)) -> u32 {
    emit::count(outcome);
    match verdict {
        policy::Verdict::Pass => SK_PASS,
        policy::Verdict::Drop => SK_DROP,
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
