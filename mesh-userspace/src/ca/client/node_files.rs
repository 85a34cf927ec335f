//! A node's own certificate and key, and the mesh's roots: `node/cert.pem`, `node/key.pem` (0600) and `bundle.pem` in
//! the identity directory.
//!
//! Certificate and key are two files and change together. A new key waits in `key.next.pem` until its certificate is
//! there; whatever interrupts the change, one of the two keys fits the certificate.

use crate::ca::CaError;
use crate::ca::authority::pem;
use crate::ca::key::Key;
use crate::identity::certificate::has_public_key;
use crate::identity::{IdentityError, files};
use rcgen::PublicKeyData;
use rustls_pki_types::CertificateDer;
use std::path::{Path, PathBuf};

const JOIN: &str = "let this node join with `nodemesh join`";
const NEXT_KEY_FILE: &str = "key.next.pem";

#[derive(Clone, Debug)]
pub(super) struct NodeFiles {
    bundle: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    next_key: PathBuf,
}

/// What a node needs to speak to its authority.
pub(super) struct Stored {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: Key,
    pub(super) roots: Vec<CertificateDer<'static>>,
}

impl NodeFiles {
    pub(super) fn new(directory: &Path) -> Self {
        let node = directory.join("node");
        Self {
            bundle: directory.join(files::BUNDLE_FILE),
            certificate: node.join(files::CERTIFICATE_FILE),
            key: node.join(files::KEY_FILE),
            next_key: node.join(NEXT_KEY_FILE),
        }
    }

    /// Where the node's certificate is.
    pub(super) fn certificate(&self) -> &Path {
        &self.certificate
    }

    /// Reads all three, and finishes a change that was interrupted.
    pub(super) fn read(&self) -> Result<Stored, CaError> {
        let chain = files::read_certificates(&self.certificate, JOIN)?;
        let roots = files::read_certificates(&self.bundle, JOIN)?;
        for path in [&self.key, &self.next_key] {
            if !path.exists() {
                continue;
            }
            let key = Key::from_der(files::Key::read(path, JOIN)?.der().secret_der())?;
            if has_public_key(&chain[0], &key.subject_public_key_info()) {
                if path == &self.next_key {
                    self.promote_key()?;
                }
                return Ok(Stored { chain, key, roots });
            }
        }
        let problem = format!("it is not the key of {}", self.certificate.display());
        Err(IdentityError::file(&self.key, problem, JOIN).into())
    }

    /// Makes a key and keeps it for the certificate to come. Done before anything is asked for: a disk that is full
    /// must not cost a token.
    pub(super) fn prepare(&self) -> Result<Key, CaError> {
        if let Some(directory) = self.key.parent() {
            files::make_directory(directory)?;
        }
        // The waiting key may be the one in use. What is not whole (a first join) has nothing to be lost.
        drop(self.read());
        let key = Key::generate()?;
        files::write(&self.next_key, key.to_pem().as_bytes(), files::PRIVATE)?;
        Ok(key)
    }

    /// The certificate of the prepared key has come.
    pub(super) fn complete(&self, chain: &[CertificateDer<'static>]) -> Result<(), CaError> {
        files::write(&self.certificate, pem(chain).as_bytes(), files::PUBLIC)?;
        self.promote_key()
    }

    fn promote_key(&self) -> Result<(), CaError> {
        std::fs::rename(&self.next_key, &self.key).map_err(|error| {
            IdentityError::file(&self.key, error, "make sure that the directory can be written").into()
        })
    }

    /// Stores the roots, if they are others than before.
    pub(super) fn write_bundle(&self, roots: &[CertificateDer<'static>]) -> Result<(), CaError> {
        let text = pem(roots);
        if files::read_text(&self.bundle)? != text {
            files::write(&self.bundle, text.as_bytes(), files::PUBLIC)?;
        }
        Ok(())
    }
}

/// The node's chain in an identity directory, as an attacker would take it.
#[cfg(test)]
pub(in crate::ca) fn node_chain(directory: &Path) -> Vec<CertificateDer<'static>> {
    NodeFiles::new(directory).read().expect("the node has joined").chain
}
