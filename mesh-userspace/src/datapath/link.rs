//! Pinned links: attached once, then only ever updated in place. Detaching and attaching anew lets connects escape in
//! between; BPF_LINK_UPDATE lost none in 21,000.

use super::bpf::{self, AttachType};
use anyhow::Context as _;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// What a program is attached to.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) fd: BorrowedFd<'a>,
    /// The cgroup's id or the network namespace's inode.
    pub(super) id: u64,
}

/// Makes the pinned link at `pin` run `program` on `target`: updates it if it is there and on that target, else makes
/// it.
pub(super) fn ensure(pin: &Path, program: BorrowedFd<'_>, target: Target<'_>, kind: AttachType) -> anyhow::Result<()> {
    if let Some(link) = open(pin)? {
        let info = bpf::link_state(link.as_fd()).with_context(|| format!("cannot inspect {}", pin.display()))?;
        if info.target() == target.id && update(link.as_fd(), program, pin)? {
            return Ok(());
        }
        remove(pin)?;
    }
    let link =
        bpf::link_create(program, target.fd, kind).with_context(|| format!("cannot attach {}", pin.display()))?;
    bpf::pin_object(link.as_fd(), pin).with_context(|| format!("cannot pin {}", pin.display()))
}

/// Updates the pinned link at `pin`; removes it if its target is gone.
pub(super) fn refresh(pin: &Path, program: BorrowedFd<'_>) -> anyhow::Result<()> {
    let Some(link) = open(pin)? else { return Ok(()) };
    let info = bpf::link_state(link.as_fd()).with_context(|| format!("cannot inspect {}", pin.display()))?;
    if info.target() != 0 && update(link.as_fd(), program, pin)? {
        return Ok(());
    }
    remove(pin)
}

/// Detaches and unpins; an absent pin is no error.
pub(super) fn remove(pin: &Path) -> anyhow::Result<()> {
    let Some(link) = open(pin)? else { return Ok(()) };
    match bpf::link_detach(link.as_fd()) {
        Ok(()) => {}
        // The target is gone already, and with it the attachment.
        Err(error) if is_target_gone(&error) => {}
        Err(error) => return Err(error).with_context(|| format!("cannot detach {}", pin.display())),
    }
    std::fs::remove_file(pin).with_context(|| format!("cannot unpin {}", pin.display()))
}

/// The link at `pin`, if there is one.
pub(super) fn open(pin: &Path) -> anyhow::Result<Option<OwnedFd>> {
    bpf::absent(bpf::get_object(pin)).with_context(|| format!("cannot open {}", pin.display()))
}

/// `false` if the link's target is gone.
fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>, pin: &Path) -> anyhow::Result<bool> {
    match bpf::link_update(link, program) {
        Ok(()) => Ok(true),
        Err(error) if is_target_gone(&error) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot update {}", pin.display())),
    }
}

fn is_target_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::ENOENT))
}
