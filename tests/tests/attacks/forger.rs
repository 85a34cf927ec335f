//! Certificates that no honest authority makes, and a client that presents them.

use anyhow::Result;
use mesh_tests::cluster::TRUST_DOMAIN;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs::default_provider};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use std::sync::Arc;
use time::OffsetDateTime;

/// An authority that n2 trusts, in the attacker's hands, to make what no honest authority does.
pub(crate) struct Forger {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl Forger {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let mut params = params(&[&format!("spiffe://{TRUST_DOMAIN}")], (-1, 24))?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    pub(crate) fn client(&self, uris: &[&str], hours: (i64, i64)) -> Result<ClientConfig> {
        let key = KeyPair::generate()?;
        let leaf = params(uris, hours)?.signed_by(&key, &self.issuer)?;
        client_config(Some((leaf.der().clone(), key)))
    }
}

fn params(uris: &[&str], (start, end): (i64, i64)) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let hours = |number| OffsetDateTime::now_utc() + time::Duration::hours(number);
    (params.not_before, params.not_after) = (hours(start), hours(end));
    for uri in uris {
        params.subject_alt_names.push(SanType::URI((*uri).try_into()?));
    }
    Ok(params)
}

pub(crate) fn client_config(presented: Option<(CertificateDer<'static>, KeyPair)>) -> Result<ClientConfig> {
    let provider = Arc::new(default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let mut config = match presented {
        None => builder.with_no_client_auth(),
        Some((leaf, key)) => {
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            builder.with_client_auth_cert(vec![leaf], key)?
        }
    };
    config.alpn_protocols = vec![mesh_userspace::identity::ALPN.to_vec()];
    Ok(config)
}

/// Believes every server: the attacker does not care who it talks to.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
