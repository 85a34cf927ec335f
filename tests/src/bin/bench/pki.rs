//! Certificates for the proxies that the mesh is compared with: like the mesh's own (P-256, a SPIFFE ID each), and with a
//! DNS name beside it, for nginx checks no other.

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use std::fs;
use std::path::{Path, PathBuf};

/// The DNS name of every certificate.
pub(crate) const NAME: &str = "peer.bench";

pub(crate) struct Pki {
    pub(crate) bundle: PathBuf,
    pub(crate) client: Leaf,
    pub(crate) server: Leaf,
}

pub(crate) struct Leaf {
    pub(crate) id: String,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// Both in one file.
    pub(crate) both: PathBuf,
}

impl Pki {
    /// Makes a root and two leaves in a folder.
    pub(crate) fn create(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let key = KeyPair::generate()?;
        let mut root = CertificateParams::default();
        // Whose name is its issuer's counts as self-signed.
        root.distinguished_name.push(DnType::CommonName, "nodemesh bench root");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let bundle = folder.join("bundle.pem");
        fs::write(&bundle, root.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(root, key);
        let leaf = |name| Leaf::create(folder, name, &issuer);
        Ok(Self { bundle, client: leaf("client")?, server: leaf("server")? })
    }
}

impl Leaf {
    fn create(folder: &Path, name: &str, issuer: &Issuer<'_, KeyPair>) -> Result<Self> {
        let id = format!("spiffe://mesh.test/ns/default/sa/{name}");
        let mut parameters = CertificateParams::new([NAME.to_owned()])?;
        parameters.subject_alt_names.push(SanType::URI(id.as_str().try_into()?));
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, issuer)?.pem();
        let path = |suffix| folder.join(format!("{name}-{suffix}.pem"));
        let leaf = Self { id, certificate: path("cert"), key: path("key"), both: path("both") };
        fs::write(&leaf.certificate, &certificate)?;
        fs::write(&leaf.key, key.serialize_pem())?;
        fs::write(&leaf.both, certificate + &key.serialize_pem())?;
        Ok(leaf)
    }
}
