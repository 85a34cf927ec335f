//! Reading and writing certificates and keys: whole files or none, keys for their owner only.

use super::IdentityError;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zeroize::{Zeroize, Zeroizing};

/// Permission bits of a private key's file.
pub(crate) const PRIVATE: u32 = 0o600;
/// Permission bits of a certificate's file.
pub(crate) const PUBLIC: u32 = 0o644;

/// The name of a certificate's file beside its key.
pub(crate) const CERTIFICATE_FILE: &str = "cert.pem";
/// The name of a key's file.
pub(crate) const KEY_FILE: &str = "key.pem";
/// The name of the file with the mesh's root certificates.
pub(crate) const BUNDLE_FILE: &str = "bundle.pem";

/// Certificates of a PEM file, at least one.
pub(crate) fn read_certificates(path: &Path, fix: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let text = fs::read(path).map_err(|error| IdentityError::file(path, error, fix))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| IdentityError::file(path, format!("it is no PEM file: {error:?}"), fix))?;
    if certificates.is_empty() {
        return Err(IdentityError::file(path, "it holds no CERTIFICATE block", fix));
    }
    Ok(certificates)
}

/// A text file, empty if there is none.
pub(crate) fn read_text(path: &Path) -> Result<String, IdentityError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(|error| IdentityError::file(path, error, "make sure that it can be read")),
    }
}

/// A private key, wiped from memory when dropped.
pub(crate) struct Key(PrivateKeyDer<'static>);

impl Key {
    /// Reads a PEM file that nobody but its owner may read.
    pub(crate) fn read(path: &Path, fix: &str) -> Result<Self, IdentityError> {
        let mut file = fs::File::open(path).map_err(|error| IdentityError::file(path, error, fix))?;
        let permissions = file.metadata().map_err(|error| IdentityError::file(path, error, fix))?.mode() & 0o7777;
        if permissions & 0o077 != 0 {
            let problem = format!("its permissions {permissions:04o} let others than its owner use the key");
            return Err(IdentityError::file(path, problem, format!("run `chmod 600 {}`", path.display())));
        }
        let mut text = Zeroizing::new(Vec::new());
        io::Read::read_to_end(&mut file, &mut text).map_err(|error| IdentityError::file(path, error, fix))?;
        let key = PrivateKeyDer::from_pem_slice(&text)
            .map_err(|error| IdentityError::file(path, format!("it holds no private key: {error:?}"), fix))?;
        Ok(Self(key))
    }

    /// A key that was made here (PKCS #8, DER).
    pub(super) fn from_pkcs8(der: Vec<u8>) -> Self {
        Self(PrivateKeyDer::Pkcs8(der.into()))
    }

    pub(crate) fn der(&self) -> &PrivateKeyDer<'static> {
        &self.0
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Makes a directory for keys, and its parents.
pub(crate) fn make_directory(path: &Path) -> Result<(), IdentityError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| IdentityError::file(path, error, "choose a directory that can be made"))
}

/// Writes a file whole or not at all, replacing an older one.
pub(crate) fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), IdentityError> {
    let temporary = temporary_beside(path);
    let outcome = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The name itself must survive a power cut too.
        path.parent().map_or(Ok(()), |directory| fs::File::open(directory)?.sync_all())
    })();
    outcome.map_err(|error| {
        // Absent where it was published; nothing else can be done about a leftover here.
        let _ = fs::remove_file(&temporary);
        IdentityError::file(path, error, "make sure that the directory can be written and has room")
    })
}

fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        write(&path, b"first", PRIVATE).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        write(&path, b"third", PRIVATE).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        let pem = rcgen::KeyPair::generate().unwrap().serialize_pem();
        for mode in [0o640, 0o604, 0o660] {
            write(&path, pem.as_bytes(), PRIVATE).unwrap();
            // Not through open(2): the umask would have its say.
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = Key::read(&path, "").err().expect("refused").to_string();
            assert!(error.contains(&format!("{mode:04o}")) && error.contains("chmod 600"), "{error}");
        }
        write(&path, pem.as_bytes(), PRIVATE).unwrap();
        assert!(Key::read(&path, "").is_ok());
    }
}
