//! TLS configurations. TLS 1.3 only, the provider named here and not process-wide, X25519MLKEM768 preferred.

use super::locals::{Local, Locals};
use super::sessions::{CertificateSessions, PairSessions};
use super::verify::{ExpectedServer, MemberClient};
use super::{ALPN, IdentityError};
use crate::model::{SpiffeId, TrustDomain};
use arc_swap::ArcSwap;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use std::sync::{Arc, LazyLock};

/// Sessions that a server remembers, of all its identities; beyond it the oldest is forgotten and costs its client a
/// full handshake. About 2 KiB each.
const SERVER_SESSIONS: usize = 4096;

/// The one crypto provider. Its default order of key exchanges puts X25519MLKEM768 first; of the ciphers, the one that
/// costs least comes first: AES-128 is as far out of reach as AES-256, and takes a quarter less time.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = aws_lc_rs::default_provider();
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        Arc::new(provider)
    });
    PROVIDER.clone()
}

/// `source` speaks to `destination`. Sessions are kept in the configuration, so they cannot leave the pair.
pub(super) fn client_config(
    roots: &Arc<RootCertStore>,
    source: &Local,
    destination: &SpiffeId,
) -> Result<Arc<ClientConfig>, IdentityError> {
    let provider = provider();
    let sessions = Arc::new(PairSessions::new(source.certificate.not_after));
    let verifier = Arc::new(ExpectedServer {
        expected: destination.clone(),
        roots: roots.clone(),
        algorithms: provider.signature_verification_algorithms,
        sessions: sessions.clone(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(source.key.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::store(sessions);
    Ok(Arc::new(config))
}

/// Every local identity answers, each under its own name; those of the moment of the handshake.
///
/// A session cannot be carried from one identity to another: rustls looks the certificate up by the asked name before
/// it looks at tickets, and takes a ticket only for the name under which it was given.
pub(super) fn server_config(
    roots: &Arc<RootCertStore>,
    locals: Arc<ArcSwap<Locals>>,
    trust_domain: &TrustDomain,
) -> Result<Arc<ServerConfig>, IdentityError> {
    let provider = provider();
    let verifier = MemberClient::new(roots.clone(), trust_domain.clone(), provider.clone())?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(ByAskedName(locals.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(CertificateSessions::new(SERVER_SESSIONS, locals));
    Ok(Arc::new(config))
}

/// Picks the certificate of the identity that the client asks for; without one the handshake ends.
#[derive(Debug)]
struct ByAskedName(Arc<ArcSwap<Locals>>);

impl ResolvesServerCert for ByAskedName {
    fn resolve(&self, client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().named(client_hello.server_name()?).map(|local| local.key.clone())
    }
}
