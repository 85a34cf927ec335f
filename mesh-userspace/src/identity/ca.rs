//! The embedded certificate authority: one P-256 root per trust domain, in a directory.

use super::files::{self, BUNDLE_FILE, CERTIFICATE_FILE, KEY_FILE, Key, PRIVATE, PUBLIC};
use super::{Certificate, IdentityError, certificate, tls};
use crate::model::{ObjectName, SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;
use time::OffsetDateTime;
use zeroize::Zeroizing;

/// How long a workload's certificate lives unless told otherwise.
pub const DEFAULT_TTL: Duration = Duration::from_secs(12 * 60 * 60);
/// The longest life of a workload's certificate.
pub const MAX_TTL: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How long a root lives.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Certificates start in the past, for peers whose clocks are slow.
const BACK_DATED: Duration = Duration::from_secs(60);

const ROOT_FILE: &str = "ca.pem";
const ROOT_KEY_FILE: &str = "ca-key.pem";
const RESTORE: &str = "restore it from a backup, or make a new CA with `nodemeshd ca init`";

/// Makes a root for `trust_domain` in `directory`: `ca.pem` and `ca-key.pem` (0600).
///
/// # Errors
/// If a CA is there already, which is never overwritten, or the files cannot be written.
pub fn init(directory: &Path, trust_domain: &TrustDomain) -> Result<(), IdentityError> {
    files::make_directory(directory)?;
    let (root, key) = (directory.join(ROOT_FILE), directory.join(ROOT_KEY_FILE));
    for path in [&root, &key] {
        if path.symlink_metadata().is_ok() {
            return Err(IdentityError::file(path, "a CA is there already", "choose another directory"));
        }
    }
    let pair = KeyPair::generate()?;
    let mut name = format!("nodemesh root {trust_domain}");
    name.truncate(64 - 9);
    // Roots of one trust domain have different names, so that chains of a foreign root are told apart by issuer.
    write!(name, " {}", hexadecimal(&random::<4>()?)).expect("writing to a String");
    let validity = Validity::starting_now(ROOT_TTL)?;
    let mut params = params(&format!("spiffe://{trust_domain}"), validity)?;
    params.distinguished_name.push(DnType::CommonName, name);
    // One intermediate may stand between the root and workloads.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&pair)?;
    files::write_new(&key, Zeroizing::new(pair.serialize_pem()).as_bytes(), PRIVATE)?;
    files::write_new(&root, certificate.pem().as_bytes(), PUBLIC)
}

/// Issues a certificate to a service account, valid for `ttl` from now, and stores it with its key and the root in
/// the identity directory `out`.
///
/// # Errors
/// If the CA cannot be used, `ttl` is zero or longer than [`MAX_TTL`], or the files cannot be written.
pub fn issue(directory: &Path, account: &ObjectName, ttl: Duration, out: &Path) -> Result<Certificate, IdentityError> {
    let authority = Authority::open(directory)?;
    let id = SpiffeId::for_service_account(authority.trust_domain(), account)
        .map_err(|error| IdentityError::Refused(error.to_string()))?;
    let issued = authority.sign(&id, Validity::starting_now(ttl)?)?;
    authority.add_to_bundle(out)?;
    issued.store(out)?;
    Ok(issued.certificate)
}

/// From when to when a certificate is valid, both inclusive, in whole seconds.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// From now (60 s ago, for slow clocks) until `ttl` from now.
    ///
    /// # Errors
    /// If `ttl` is zero, or so long that the end has no date.
    pub fn starting_now(ttl: Duration) -> Result<Self, IdentityError> {
        let now = OffsetDateTime::now_utc();
        let end = time::Duration::try_from(ttl).ok().and_then(|ttl| now.checked_add(ttl));
        match end {
            Some(not_after) if ttl >= Duration::from_secs(1) => Ok(Self { not_before: now - BACK_DATED, not_after }),
            _ => Err(IdentityError::Refused("its life must be at least a second and end before the year 9999".into())),
        }
    }
}

/// A CA that is ready to sign.
pub struct Authority {
    trust_domain: TrustDomain,
    root: CertificateDer<'static>,
    root_pem: String,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Opens the CA that [`init`] made.
    ///
    /// # Errors
    /// If a file is missing, unreadable, readable by others (key), or does not fit the other.
    pub fn open(directory: &Path) -> Result<Self, IdentityError> {
        let path = directory.join(ROOT_FILE);
        let root = files::read_certificates(&path, RESTORE)?.swap_remove(0);
        let unusable = |problem: &dyn std::fmt::Display| IdentityError::file(&path, problem, RESTORE);
        let claimed = certificate::claimed_trust_domain(&root).map_err(|refusal| unusable(&refusal))?;
        let claimed = claimed.ok_or_else(|| unusable(&"it names no trust domain (spiffe://...)"))?;
        let trust_domain = TrustDomain::parse(&claimed).map_err(|error| unusable(&error))?;
        let (_, not_after) = certificate::validity(&root).map_err(|refusal| unusable(&refusal))?;
        let key_path = directory.join(ROOT_KEY_FILE);
        let key = Key::read(&key_path, RESTORE)?;
        let pair = KeyPair::try_from(key.der()).map_err(|error| IdentityError::file(&key_path, error, RESTORE))?;
        if !certificate::has_public_key(&root, &rcgen::PublicKeyData::subject_public_key_info(&pair)) {
            return Err(IdentityError::file(&key_path, format!("it is not the key of {}", path.display()), RESTORE));
        }
        let issuer = Issuer::from_ca_cert_der(&root, pair).map_err(|error| unusable(&error))?;
        Ok(Self { trust_domain, root, root_pem: files::read_text(&path)?, not_after, issuer })
    }

    /// The trust domain that it was made for.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Makes a key and a certificate of it. The certificate ends with the root at the latest.
    ///
    /// # Errors
    /// If `id` is of another trust domain, or `validity` is empty, longer than [`MAX_TTL`] or after the root's end.
    pub fn sign(&self, id: &SpiffeId, validity: Validity) -> Result<Issued, IdentityError> {
        if id.trust_domain() != self.trust_domain.as_str() {
            return Err(IdentityError::Foreign { id: id.clone(), trust_domain: self.trust_domain.clone() });
        }
        let Validity { not_before, not_after } = validity;
        if not_before >= not_after || not_before >= self.not_after {
            return Err(IdentityError::Refused("it would never be valid".into()));
        }
        if not_after - not_before > MAX_TTL + BACK_DATED {
            let days = MAX_TTL.as_secs() / (24 * 60 * 60);
            return Err(IdentityError::Refused(format!("its life may not be longer than {days} days")));
        }
        let validity = Validity { not_before, not_after: not_after.min(self.not_after) };
        let mut params = params(id.as_str(), validity)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let pair = KeyPair::generate()?;
        let signed = params.signed_by(&pair, &self.issuer)?;
        let certificate =
            Certificate::parse(signed.der()).map_err(|refusal| IdentityError::Refused(refusal.to_string()))?;
        Ok(Issued { certificate, certificate_pem: signed.pem(), key_pem: Zeroizing::new(pair.serialize_pem()) })
    }

    /// Makes sure that the bundle of the identity directory `out` holds this root; roots already there stay.
    ///
    /// # Errors
    /// If the bundle cannot be read or written.
    pub fn add_to_bundle(&self, out: &Path) -> Result<(), IdentityError> {
        files::make_directory(out)?;
        let path = out.join(BUNDLE_FILE);
        let mut text = files::read_text(&path)?;
        if !text.is_empty() {
            let roots = files::read_certificates(&path, "remove it, and issue again")?;
            if roots.contains(&self.root) {
                return Ok(());
            }
            text = format!("{}\n", text.trim_end());
        }
        text.push_str(&self.root_pem);
        files::write(&path, text.as_bytes(), PUBLIC)
    }
}

/// A certificate fresh from the CA, with its key.
pub struct Issued {
    pub certificate: Certificate,
    certificate_pem: String,
    key_pem: Zeroizing<String>,
}

impl Issued {
    /// Writes `ns/<namespace>/sa/<service account>/{cert,key}.pem` under the identity directory `out`, replacing older
    /// ones.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub fn store(&self, out: &Path) -> Result<(), IdentityError> {
        let id = &self.certificate.id;
        let directory = out.join("ns").join(id.namespace()).join("sa").join(id.service_account());
        files::make_directory(&directory)?;
        files::write(&directory.join(KEY_FILE), self.key_pem.as_bytes(), PRIVATE)?;
        files::write(&directory.join(CERTIFICATE_FILE), self.certificate_pem.as_bytes(), PUBLIC)
    }
}

/// What all certificates here have in common: one URI name, a random serial number.
fn params(uri: &str, validity: Validity) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::default();
    // A certificate without a subject marks its names as critical, as SPIFFE asks.
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    params.not_before = validity.not_before;
    params.not_after = validity.not_after;
    let mut serial = random::<16>()?;
    // Positive, and 16 bytes long in any encoding.
    serial[0] = serial[0] & 0x3f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn random<const N: usize>() -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    tls::provider().secure_random.fill(&mut bytes).map_err(rustls::Error::from)?;
    Ok(bytes)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    fn ca() -> TempDir {
        let directory = TempDir::new().unwrap();
        init(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap();
        directory
    }

    fn account() -> ObjectName {
        ObjectName::parse("shop", "cart").unwrap()
    }

    #[test]
    fn an_existing_ca_is_never_overwritten() {
        let directory = ca();
        let root = fs::read(directory.path().join(ROOT_FILE)).unwrap();
        let again = init(directory.path(), &TrustDomain::parse("example.org").unwrap());
        assert!(again.unwrap_err().to_string().contains("a CA is there already"));
        fs::remove_file(directory.path().join(ROOT_KEY_FILE)).unwrap();
        assert!(init(directory.path(), &TrustDomain::parse("example.org").unwrap()).is_err());
        assert_eq!(fs::read(directory.path().join(ROOT_FILE)).unwrap(), root);
    }

    #[test]
    fn keys_are_for_their_owner_only() {
        let (directory, out) = (ca(), TempDir::new().unwrap());
        issue(directory.path(), &account(), DEFAULT_TTL, out.path()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory.path().join(ROOT_KEY_FILE)), 0o600);
        assert_eq!(mode(&out.path().join("ns/shop/sa/cart/key.pem")), 0o600);
    }

    #[test]
    fn an_issued_certificate_says_exactly_what_it_should() {
        let (directory, out) = (ca(), TempDir::new().unwrap());
        let before = OffsetDateTime::now_utc();
        let issued = issue(directory.path(), &account(), Duration::from_secs(300), out.path()).unwrap();
        assert_eq!(issued.id.as_str(), "spiffe://example.org/ns/shop/sa/cart");
        let slack = time::Duration::seconds(30);
        assert!((issued.not_before - (before - BACK_DATED)).abs() < slack);
        assert!((issued.not_after - (before + Duration::from_secs(300))).abs() < slack);
        let chain = files::read_certificates(&out.path().join("ns/shop/sa/cart/cert.pem"), "").unwrap();
        let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
        assert!(!leaf.is_ca());
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(names.critical && names.value.general_names.len() == 1);
        let usage = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.server_auth && usage.client_auth && !usage.any);
        let usage = leaf.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
        let again = issue(directory.path(), &account(), Duration::from_secs(300), out.path()).unwrap();
        assert_ne!(again.serial, issued.serial);
        assert_eq!(files::read_certificates(&out.path().join(BUNDLE_FILE), "").unwrap().len(), 1);
    }

    #[test]
    fn a_root_may_only_sign() {
        let directory = ca();
        let root = files::read_certificates(&directory.path().join(ROOT_FILE), "").unwrap();
        let (_, root) = x509_parser::parse_x509_certificate(&root[0]).unwrap();
        let constraints = root.basic_constraints().unwrap().unwrap().value;
        assert!(constraints.ca && constraints.path_len_constraint == Some(1));
        let usage = root.key_usage().unwrap().unwrap().value;
        assert!(usage.key_cert_sign() && !usage.digital_signature());
    }

    #[test]
    fn senseless_lives_are_refused() {
        let (directory, out) = (ca(), TempDir::new().unwrap());
        for ttl in [Duration::ZERO, Duration::from_millis(10), MAX_TTL + Duration::from_secs(1), Duration::MAX] {
            let refused = issue(directory.path(), &account(), ttl, out.path());
            assert!(matches!(refused, Err(IdentityError::Refused(_))), "{ttl:?}");
        }
        assert!(!out.path().join("ns").exists());
    }

    #[test]
    fn an_authority_signs_for_its_own_trust_domain_only() {
        let directory = ca();
        let foreign = SpiffeId::parse("spiffe://example.com/ns/shop/sa/cart").unwrap();
        let refused =
            Authority::open(directory.path()).unwrap().sign(&foreign, Validity::starting_now(DEFAULT_TTL).unwrap());
        assert!(matches!(refused, Err(IdentityError::Foreign { .. })));
    }

    #[test]
    fn a_key_of_another_root_is_noticed() {
        let (directory, other) = (ca(), ca());
        fs::copy(other.path().join(ROOT_KEY_FILE), directory.path().join(ROOT_KEY_FILE)).unwrap();
        let error = Authority::open(directory.path()).err().expect("refused").to_string();
        assert!(error.contains("it is not the key of"), "{error}");
    }
}
