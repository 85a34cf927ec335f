//! TLS between nodes and the authority: 1.3 only, nothing resumed.
//!
//! A client names the root that it trusts (its hash, as the server name), and the server answers with a chain below
//! that root if it has one: so a change of the root shuts nobody out who has not heard of it yet. The chain includes
//! the root itself: who joins knows its hash only.

use super::authority::{Authority, Live, public_key_digest};
use super::certificate::{Profile, Validity};
use super::digest::Digest;
use super::key::Key;
use super::{CaError, Lives};
use crate::identity::certificate::{claimed_trust_domain, uris_of};
use crate::identity::tls::provider;
use crate::model::{NodeId, TrustDomain};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::crypto::verify_tls13_signature;
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, DnsName, ServerName, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;

/// The application protocol of the authority's port.
const ALPN: &[u8] = b"http/1.1";
/// How long the authority's own certificate lives; it is made anew at half of it.
const SERVER_TTL: Duration = Duration::from_hours(24);

/// The name under which a client asks for a chain below the root with this public key.
pub(super) fn server_name(root: Digest) -> ServerName<'static> {
    ServerName::DnsName(DnsName::try_from(label(root)).expect("hexadecimal labels make a DNS name"))
}

fn label(root: Digest) -> String {
    let hex = root.to_hex();
    // A label has 63 letters at most, the hash 64.
    format!("{}.{}.ca.nodemesh.internal", &hex[..32], &hex[32..])
}

/// The server's configuration, and until when to use it.
pub(super) struct Serving {
    pub(super) config: Arc<ServerConfig>,
    /// What it was made of.
    live: Arc<Live>,
    renew_at: OffsetDateTime,
}

impl Serving {
    /// A configuration for the authority as it is now, with fresh certificates.
    pub(super) fn new(authority: &Authority, now: OffsetDateTime) -> Result<Self, CaError> {
        let live = arc_swap::Guard::into_inner(authority.live());
        let ttl = SERVER_TTL.min(longest(authority.lives()));
        let uri = NodeId::of_authority(authority.trust_domain());
        let key = Key::generate()?;
        let signing = any_supported_type(&key.to_tls())?;
        let active = live.active()?.root_digest;
        let mut chains = Vec::new();
        for signer in live.signers() {
            let mut chain = signer.leaf(Profile::Server, &uri, &key, Validity::starting_at(now, ttl)?)?.0;
            chain.push(signer.root_certificate.clone());
            let certified = Arc::new(CertifiedKey::new(chain, signing.clone()));
            chains.push((label(signer.root_digest), signer.root_digest == active, certified));
        }
        let provider = provider();
        let mut roots = RootCertStore::empty();
        for root in live.bundle().roots {
            roots.add(root)?;
        }
        // Who joins has no certificate yet. Hints would tell the roots' names to whoever dials.
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .clear_root_hint_subjects()
            .allow_unauthenticated()
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(ByRoot(chains)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Every connection proves itself anew: a session would outlive a revoked root.
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config), live, renew_at: now + ttl / 2 })
    }

    /// Whether it still says what the authority is.
    pub(super) fn is_current(&self, authority: &Authority, now: OffsetDateTime) -> bool {
        Arc::ptr_eq(&self.live, &authority.live()) && now < self.renew_at
    }
}

fn longest(lives: Lives) -> Duration {
    lives.workload.max(lives.node)
}

/// Chains by the label of their root; the active one answers for roots that it does not know.
#[derive(Debug)]
struct ByRoot(Vec<(String, bool, Arc<CertifiedKey>)>);

impl ResolvesServerCert for ByRoot {
    fn resolve(&self, client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let asked = client_hello.server_name().unwrap_or_default();
        let named = self.0.iter().find(|(label, ..)| label == asked);
        let chain = named.or_else(|| self.0.iter().find(|(_, is_active, _)| *is_active));
        chain.map(|(.., chain)| chain.clone())
    }
}

/// What a client believes of the authority.
#[derive(Debug)]
enum Trust {
    /// Its root has this public key.
    Pin(Digest),
    /// It comes from one of these roots and is of this trust domain.
    Roots(Arc<RootCertStore>, TrustDomain),
}

/// The authority must be `spiffe://<trust domain>/ca`, whatever else its certificate comes from.
#[derive(Debug)]
struct AuthorityVerifier(Trust);

impl ServerCertVerifier for AuthorityVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let (roots, trust_domain) = match &self.0 {
            Trust::Roots(roots, trust_domain) => (roots.clone(), trust_domain.clone()),
            Trust::Pin(pin) => pinned(*pin, intermediates)?,
        };
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider().signature_verification_algorithms;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, now, algorithms.all)?;
        let uris = uris_of(end_entity).ok_or(CertificateError::BadEncoding)?;
        if uris != [NodeId::of_authority(&trust_domain)] {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is never negotiated".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The presented root with the pinned key, and the trust domain that it claims.
fn pinned(pin: Digest, presented: &[CertificateDer<'_>]) -> Result<(Arc<RootCertStore>, TrustDomain), Error> {
    let root = presented.iter().find(|certificate| public_key_digest(certificate) == Some(pin));
    let root = root.ok_or(CertificateError::UnknownIssuer)?;
    let claimed = claimed_trust_domain(root).ok().flatten().ok_or(CertificateError::BadEncoding)?;
    let trust_domain = TrustDomain::parse(&claimed).map_err(|_| CertificateError::BadEncoding)?;
    let mut roots = RootCertStore::empty();
    roots.add(root.clone().into_owned())?;
    Ok((Arc::new(roots), trust_domain))
}

/// For who joins: the authority is known by its root's hash, and the client has no certificate.
pub(super) fn joining_config(pin: Digest) -> Result<Arc<ClientConfig>, Error> {
    let config = builder(Trust::Pin(pin))?.with_no_client_auth();
    Ok(finished(config))
}

/// For a node: the authority is known by the bundle, the node by its certificate.
pub(super) fn node_config(
    roots: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
    chain: Vec<CertificateDer<'static>>,
    key: &Key,
) -> Result<Arc<ClientConfig>, Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    let trust = Trust::Roots(Arc::new(store), trust_domain.clone());
    let config = builder(trust)?.with_client_auth_cert(chain, key.to_tls())?;
    Ok(finished(config))
}

fn builder(trust: Trust) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, Error> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AuthorityVerifier(trust))))
}

fn finished(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Arc::new(config)
}
