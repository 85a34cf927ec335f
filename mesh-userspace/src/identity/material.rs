//! Certificates and keys as they are on disk, checked as a whole.

use super::files::{self, BUNDLE_FILE, CERTIFICATE_FILE, KEY_FILE, Key};
use super::{Certificate, IdentityError, certificate, name};
use crate::model::{ObjectName, SpiffeId, TrustDomain};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, Error, RootCertStore};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;

const ISSUE: &str = "issue it again with `nodemeshd ca issue`";
const BUNDLE: &str = "put the mesh's root certificates there (ca.pem of `nodemeshd ca init`)";

/// One identity of this node.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) key: Arc<CertifiedKey>,
    pub(super) certificate: Certificate,
}

/// Everything that an identity directory says, valid together.
#[derive(Debug)]
pub(super) struct Material {
    bundle: Vec<CertificateDer<'static>>,
    pub(super) roots: Arc<RootCertStore>,
    pub(super) locals: BTreeMap<SpiffeId, Local>,
    /// Local identities by the name that clients ask for.
    pub(super) names: HashMap<String, SpiffeId>,
}

impl Material {
    /// Reads and checks a directory: `bundle.pem` and `ns/<namespace>/sa/<service account>/{cert,key}.pem`.
    pub(super) fn read(
        directory: &Path,
        trust_domain: &TrustDomain,
        provider: &CryptoProvider,
    ) -> Result<Self, IdentityError> {
        let bundle_file = directory.join(BUNDLE_FILE);
        let bundle = files::read_certificates(&bundle_file, BUNDLE)?;
        let roots = Arc::new(read_roots(&bundle_file, &bundle, trust_domain)?);
        let mut locals = BTreeMap::new();
        for (account, directory) in accounts(directory)? {
            let id = SpiffeId::for_service_account(trust_domain, &account)
                .map_err(|error| IdentityError::file(&directory, error, "use shorter names"))?;
            let local = read_local(&directory, &id, &roots, provider)?;
            locals.insert(id, local);
        }
        let names = locals.keys().map(|id| (name::label(id), id.clone())).collect();
        Ok(Self { bundle, roots, locals, names })
    }

    /// Whether both hold the same certificates (and thus the same keys, which are checked against them).
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let chains = |material: &Self| material.locals.values().map(|local| local.key.cert.clone()).collect::<Vec<_>>();
        self.bundle == other.bundle && chains(self) == chains(other)
    }
}

fn read_roots(
    path: &Path,
    bundle: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for (index, root) in bundle.iter().enumerate() {
        let number = index + 1;
        let claimed = certificate::claimed_trust_domain(root)
            .map_err(|refusal| IdentityError::file(path, format!("certificate {number}: {refusal}"), BUNDLE))?;
        if let Some(claimed) = claimed.filter(|claimed| claimed != trust_domain.as_str()) {
            let problem = format!("certificate {number} is the root of trust domain {claimed}, not of {trust_domain}");
            let fix = "remove it, or correct `trustDomain` in the MeshConfig";
            return Err(IdentityError::file(path, problem, fix));
        }
        roots
            .add(root.clone())
            .map_err(|error| IdentityError::file(path, format!("certificate {number}: {error}"), BUNDLE))?;
    }
    Ok(roots)
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
    check_chain(&chain, &certificate, roots, provider)
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
    Ok(Local { key, certificate })
}

/// The chain must lead to a root; the time is judged apart.
fn check_chain(
    chain: &[CertificateDer<'_>],
    certificate: &Certificate,
    roots: &RootCertStore,
    provider: &CryptoProvider,
) -> Result<(), Error> {
    let parsed = ParsedCertificate::try_from(&chain[0])?;
    let within = u64::try_from(certificate.not_after.unix_timestamp()).map_err(|_| CertificateError::BadEncoding)?;
    verify_server_cert_signed_by_trust_anchor(
        &parsed,
        roots,
        &chain[1..],
        UnixTime::since_unix_epoch(Duration::from_secs(within)),
        provider.signature_verification_algorithms.all,
    )
}
