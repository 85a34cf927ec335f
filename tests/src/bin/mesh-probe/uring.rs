//! `IORING_OP_CONNECT` without a library: one ring, one entry, one completion.

use rustix::io_uring::{
    IORING_OFF_CQ_RING, IORING_OFF_SQ_RING, IORING_OFF_SQES, IoringEnterFlags, IoringOp, addr_or_splice_off_in_union,
    io_uring_cqe, io_uring_enter, io_uring_params, io_uring_ptr, io_uring_setup, io_uring_sqe, off_or_addr2_union,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use socket2::SockAddr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// A mapping of a ring's memory.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn new(ring: BorrowedFd<'_>, length: usize, offset: u64) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address that nothing else uses.
        let start = unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, ring, offset) }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned null"))?;
        Ok(Self { start, length })
    }

    /// A value at an offset that the kernel gave.
    fn at<T>(&self, offset: u32) -> NonNull<T> {
        let offset = usize::try_from(offset).expect("32 bits fit a usize");
        assert!(offset + size_of::<T>() <= self.length, "the kernel's offset lies outside of the ring");
        // SAFETY: in bounds, as just checked.
        unsafe { self.start.add(offset) }.cast()
    }

    fn counter(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel keeps an aligned 32-bit counter there as long as the mapping lives.
        unsafe { self.at::<AtomicU32>(offset).as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; no reference outlives `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// Connects a socket by a ring of its own and waits for the completion.
pub(crate) fn connect(socket: BorrowedFd<'_>, address: &SockAddr) -> io::Result<()> {
    let mut parameters = io_uring_params::default();
    // SAFETY: `parameters` is what the call fills in.
    let ring = unsafe { io_uring_setup(1, &mut parameters) }?;
    let (sq, cq) = (parameters.sq_off, parameters.cq_off);
    let entry_bytes = |entries: u32, size: usize| usize::try_from(entries).map(|entries| entries * size);
    let sq_length = entry_bytes(parameters.sq_entries, size_of::<u32>()).map_err(io::Error::other)?;
    let cq_length = entry_bytes(parameters.cq_entries, size_of::<io_uring_cqe>()).map_err(io::Error::other)?;
    let length = |offset: u32, entries: usize| usize::try_from(offset).map(|start| start + entries);
    let submission =
        Mapping::new(ring.as_fd(), length(sq.array, sq_length).map_err(io::Error::other)?, IORING_OFF_SQ_RING)?;
    let completion =
        Mapping::new(ring.as_fd(), length(cq.cqes, cq_length).map_err(io::Error::other)?, IORING_OFF_CQ_RING)?;
    let entries = Mapping::new(ring.as_fd(), size_of::<io_uring_sqe>(), IORING_OFF_SQES)?;

    let entry = io_uring_sqe {
        opcode: IoringOp::Connect,
        fd: socket.as_raw_fd(),
        addr_or_splice_off_in: addr_or_splice_off_in_union {
            addr: io_uring_ptr::new(address.as_ptr().cast_mut().cast()),
        },
        off_or_addr2: off_or_addr2_union { off: address.len().into() },
        ..io_uring_sqe::default()
    };
    // SAFETY: slot 0 of both arrays exists in a ring of one entry, and the kernel reads neither before the tail moves.
    unsafe {
        entries.at::<io_uring_sqe>(0).write(entry);
        submission.at::<u32>(sq.array).write(0);
    }
    submission.counter(sq.tail).fetch_add(1, Ordering::Release);
    // SAFETY: the entry's pointers (the address) and the socket live until the completion has been waited for.
    unsafe { io_uring_enter(&ring, 1, 1, IoringEnterFlags::GETEVENTS) }?;
    if completion.counter(cq.tail).load(Ordering::Acquire) == completion.counter(cq.head).load(Ordering::Relaxed) {
        return Err(io::Error::other("the ring has no completion"));
    }
    // SAFETY: the kernel wrote the first completion before it moved the tail. `res` follows the 8 bytes of user data.
    let result = unsafe { completion.at::<i32>(cq.cqes + 8).read() };
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}
