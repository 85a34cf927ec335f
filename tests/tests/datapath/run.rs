//! Running a loaded sk_lookup program on a made-up connection (`BPF_PROG_TEST_RUN`): the very program that guards the
//! namespaces, without a packet.

use mesh_common::addr::Ip;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const PROG_TEST_RUN: libc::c_long = 10;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const SK_PASS: u32 = 1;

/// `struct bpf_sk_lookup`, as programs and test runs see it.
#[repr(C)]
#[derive(Default)]
struct Context {
    socket: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    remote_port_be: u16,
    reserved: u16,
    local_ip4: u32,
    local_ip6: [u32; 4],
    local_port: u32,
    ingress_interface: u32,
    end: u32,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    answer: u32,
    data_in_size: u32,
    data_out_size: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_in_size: u32,
    context_out_size: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    end: u32,
}

/// A loaded program.
pub(crate) struct Program(OwnedFd);

impl Program {
    /// The program of this id.
    pub(crate) fn open(id: u32) -> Self {
        Self(
            bpf(PROG_GET_FD_BY_ID, &mut [id, 0, 0])
                .map(|fd| {
                    // SAFETY: the kernel has returned the descriptor just now, and nobody else has it.
                    unsafe { OwnedFd::from_raw_fd(fd) }
                })
                .unwrap(),
        )
    }

    /// Whether a TCP connection may look for its listener.
    pub(crate) fn admits(&self, from: SocketAddr, to: SocketAddr) -> bool {
        let words = |address: SocketAddr| Ip::from(address.ip()).words();
        let is_v4 = from.is_ipv4();
        let context = Context {
            family: if is_v4 { libc::AF_INET } else { libc::AF_INET6 }.unsigned_abs(),
            protocol: libc::IPPROTO_TCP.unsigned_abs(),
            remote_ip4: if is_v4 { words(from)[3] } else { 0 },
            remote_ip6: if is_v4 { [0; 4] } else { words(from) },
            remote_port_be: from.port().to_be(),
            local_ip4: if is_v4 { words(to)[3] } else { 0 },
            local_ip6: if is_v4 { [0; 4] } else { words(to) },
            local_port: to.port().into(),
            ..Context::default()
        };
        let mut run = TestRun {
            program: self.0.as_raw_fd().unsigned_abs(),
            context_in: std::ptr::from_ref(&context) as u64,
            context_in_size: u32::try_from(size_of::<Context>()).unwrap(),
            ..TestRun::default()
        };
        bpf(PROG_TEST_RUN, &mut run).unwrap();
        run.answer == SK_PASS
    }
}

fn bpf<A>(command: libc::c_long, attributes: &mut A) -> std::io::Result<i32> {
    // SAFETY: the attributes are live and their size is passed; the pointers in them are to live values of the sizes
    // that are passed with them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<A>()) };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(std::io::Error::last_os_error)
}
