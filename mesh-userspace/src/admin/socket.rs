//! The CLI's unix socket: made in one step with mode 0600, and taken over from a dead daemon only.

use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Removes the socket when dropped, unless another daemon has put its own there since.
#[derive(Debug)]
pub(super) struct BoundSocket {
    path: PathBuf,
    inode: (u64, u64),
}

impl BoundSocket {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let is_ours = inode(&self.path).is_ok_and(|inode| inode == self.inode);
        if is_ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "the admin socket could not be removed");
        }
    }
}

/// Binds `path`, making its directory if need be.
///
/// The socket is bound under another name in a directory that only we may enter, gets its mode there, and is renamed:
/// at no time does it exist under its own name with a wider mode, or without anybody listening.
pub(super) fn bind(path: &Path) -> io::Result<(UnixListener, BoundSocket)> {
    let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "it is no file name"))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    refuse_if_taken(path)?;
    let private = Private::create(parent)?;
    let early = private.0.join(name);
    let listener = UnixListener::bind(&early)?;
    std::fs::set_permissions(&early, std::fs::Permissions::from_mode(0o600))?;
    let inode = inode(&early)?;
    std::fs::rename(&early, path)?;
    Ok((listener, BoundSocket { path: path.to_owned(), inode }))
}

fn refuse_if_taken(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(ErrorKind::AlreadyExists, "something is there that is no socket; remove it"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(ErrorKind::AddrInUse, "another daemon answers there; stop it first")),
        // Nobody listens: a daemon that was killed left it behind.
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => Ok(()),
        Err(error) => Err(error),
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// A directory that only this user may enter; removed when dropped.
struct Private(PathBuf);

impl Private {
    fn create(parent: &Path) -> io::Result<Self> {
        let path = parent.join(format!(".nm{}", std::process::id()));
        // A process killed half-way may have left one under a process id that is now ours.
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "a temporary directory could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_private_and_goes_with_its_guard() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/nodemesh/admin.sock");
        let (listener, bound) = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let entries = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(entries, 1, "nothing but the socket is left in its directory");
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_living_daemons_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        let (_listener, bound) = bind(&path).unwrap();
        let refused = bind(&path).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AddrInUse);
        assert_eq!(inode(&path).unwrap(), bound.inode);
    }

    #[test]
    fn a_dead_daemons_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "closing a unix socket leaves its file");
        let (_listener, bound) = bind(&path).unwrap();
        UnixStream::connect(bound.path()).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_successors_socket_survives_the_predecessors_guard() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        let (listener, old) = bind(&path).unwrap();
        drop(listener);
        let (_listener, new) = bind(&path).unwrap();
        drop(old);
        assert_eq!(inode(&path).unwrap(), new.inode);
    }
}
