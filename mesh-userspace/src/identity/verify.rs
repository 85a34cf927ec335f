//! Whether a peer's certificate is believed: the chain by webpki, the SPIFFE ID here.

use super::sessions::PairSessions;
use super::{Certificate, PeerRefusal};
use crate::model::{SpiffeId, TrustDomain};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;

/// TLS 1.2 is not offered, so its signatures are never asked for.
fn only_tls13() -> Error {
    Error::General("TLS 1.2 is never negotiated".to_owned())
}

/// A client's view: the server must be exactly `expected`.
#[derive(Debug)]
pub(super) struct ExpectedServer {
    pub(super) expected: SpiffeId,
    pub(super) roots: Arc<RootCertStore>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    /// Sessions of this pair must not outlive the certificate that they rest on.
    pub(super) sessions: Arc<PairSessions>,
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms.all)?;
        let presented = Certificate::parse(end_entity).map_err(CertificateError::from)?;
        if presented.id != self.expected {
            tracing::debug!(expected = %self.expected, presented = %presented.id, "the server has another identity");
            return Err(CertificateError::from(PeerRefusal::IdentityMismatch).into());
        }
        self.sessions.limit(server_name, presented.not_after, now);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A server's view: the client must have an identity of the trust domain. Which one decides policy, not TLS.
#[derive(Debug)]
pub(super) struct MemberClient {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
}

impl MemberClient {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        trust_domain: TrustDomain,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        // Without hints the roots' names are not told to whoever dials the port.
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .clear_root_hint_subjects()
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self { chain, trust_domain })
    }
}

impl ClientCertVerifier for MemberClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let presented = Certificate::parse(end_entity).map_err(CertificateError::from)?;
        if presented.id.trust_domain() != self.trust_domain.as_str() {
            tracing::debug!(presented = %presented.id, expected = %self.trust_domain, "the client is of another trust domain");
            return Err(CertificateError::from(PeerRefusal::IdentityMismatch).into());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
