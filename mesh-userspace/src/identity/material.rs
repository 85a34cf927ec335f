//! Certificates and keys as they are on disk, checked as a whole.

use super::bundle::Bundle;
use super::files::{self, BUNDLE_FILE, CERTIFICATE_FILE, KEY_FILE, Key};
use super::locals::Local;
use super::{Certificate, IdentityError, certificate};
use crate::model::{ObjectName, SpiffeId, TrustDomain};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::CertifiedKey;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use time::OffsetDateTime;

const ISSUE: &str = "issue it again with `nodemeshd ca issue`";

/// Everything that an identity directory says, valid together.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) bundle: Bundle,
    pub(super) locals: Vec<Local>,
}

impl Material {
    /// Reads and checks a directory: `bundle.pem` and `ns/<namespace>/sa/<service account>/{cert,key}.pem`.
    pub(super) fn read(
        directory: &Path,
        trust_domain: &TrustDomain,
        provider: &CryptoProvider,
    ) -> Result<Self, IdentityError> {
        let bundle = Bundle::read(&directory.join(BUNDLE_FILE), trust_domain)?;
        let mut locals = Vec::new();
        for (account, directory) in accounts(directory)? {
            let id = SpiffeId::for_service_account(trust_domain, &account)
                .map_err(|error| IdentityError::file(&directory, error, "use shorter names"))?;
            locals.push(read_local(&directory, &id, &bundle.roots, provider)?);
        }
        Ok(Self { bundle, locals })
    }
}

/// Service accounts that have a directory.
fn accounts(directory: &Path) -> Result<Vec<(ObjectName, PathBuf)>, IdentityError> {
    let mut accounts = Vec::new();
    for (namespace, path) in subdirectories(&directory.join("ns"))? {
        for (account, path) in subdirectories(&path.join("sa"))? {
            let name = ObjectName::parse(&namespace, &account).map_err(|error| {
                IdentityError::file(&path, error, "name directories ns/<namespace>/sa/<service account>")
            })?;
            accounts.push((name, path));
        }
    }
    Ok(accounts)
}

/// Names that start with a dot are left alone: tools keep half-written things there. A missing directory is empty.
fn subdirectories(path: &Path) -> Result<Vec<(String, PathBuf)>, IdentityError> {
    let fail = |error| IdentityError::file(path, error, "make sure that the daemon may read it");
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && entry.path().is_dir() {
            found.push((name, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn read_local(
    directory: &Path,
    id: &SpiffeId,
    roots: &RootCertStore,
    provider: &CryptoProvider,
) -> Result<Local, IdentityError> {
    let path = directory.join(CERTIFICATE_FILE);
    let key_path = directory.join(KEY_FILE);
    let chain = files::read_certificates(&path, ISSUE)?;
    let certificate = Certificate::parse(&chain[0]).map_err(|refusal| IdentityError::file(&path, refusal, ISSUE))?;
    if certificate.id != *id {
        let problem = format!("it is the certificate of {}, but its place is that of {id}", certificate.id);
        return Err(IdentityError::file(&path, problem, "move it where it belongs, or issue the right one"));
    }
    certificate::check_chain(&chain, roots, certificate.not_after, provider)
        .map_err(|error| IdentityError::file(&path, error, format!("{ISSUE}, or add its root to {BUNDLE_FILE}")))?;
    if let Err(refusal) = certificate.check_time(OffsetDateTime::now_utc()) {
        // Not an error: it would take down the node's other identities. Peers will refuse it, and say so.
        tracing::warn!(%id, file = %path.display(), not_before = %certificate.not_before,
            not_after = %certificate.not_after, "{refusal}; {ISSUE}");
    }
    let key = Key::read(&key_path, ISSUE)?;
    let signing = any_supported_type(key.der()).map_err(|error| IdentityError::file(&key_path, error, ISSUE))?;
    let key = Arc::new(CertifiedKey::new(chain, signing));
    key.keys_match()
        .map_err(|_| IdentityError::file(&key_path, format!("it is not the key of {}", path.display()), ISSUE))?;
    Ok(Local::new(key, certificate))
}
