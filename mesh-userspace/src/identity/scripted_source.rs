//! A certificate authority inside the test: signs what it is told to, and fails when it is told to.

use super::{Answer, CertificateSource, SignedChain, SigningRequest, SourceError, TrustBundle};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use time::OffsetDateTime;

/// A root and its key.
pub(super) struct Root {
    pub(super) certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Root {
    pub(super) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// Signs a request as it stands, valid from and to seconds from now.
    pub(super) fn sign(&self, csr: &[u8], valid: (i64, i64)) -> SignedChain {
        let csr = CertificateSigningRequestDer::from(csr.to_vec());
        let mut request = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let at = |seconds| OffsetDateTime::now_utc() + time::Duration::seconds(seconds);
        (request.params.not_before, request.params.not_after) = (at(valid.0), at(valid.1));
        request.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        SignedChain(vec![request.signed_by(&self.issuer).unwrap().der().clone()])
    }
}

/// What the authority does when asked.
pub(super) struct Script {
    pub(super) trusted: Vec<Arc<Root>>,
    pub(super) signer: Arc<Root>,
    pub(super) epoch: u64,
    pub(super) life: Duration,
    /// Every call fails with this.
    pub(super) outage: Option<SourceError>,
    /// Answers nothing until told otherwise.
    pub(super) hangs: bool,
    /// Identities that are refused, by the end of their SPIFFE ID.
    pub(super) refused: Vec<&'static str>,
    /// Every second call fails.
    pub(super) is_flaky: bool,
    /// Identities asked for, call by call.
    pub(super) asked: Vec<Vec<String>>,
    calls: u64,
}

#[derive(Clone)]
pub(super) struct ScriptedSource(Arc<Mutex<Script>>);

impl ScriptedSource {
    pub(super) fn new(life: Duration) -> Self {
        let root = Arc::new(Root::new("first"));
        Self(Arc::new(Mutex::new(Script {
            trusted: vec![root.clone()],
            signer: root,
            epoch: 1,
            life,
            outage: None,
            hangs: false,
            refused: Vec::new(),
            is_flaky: false,
            asked: Vec::new(),
            calls: 0,
        })))
    }

    pub(super) fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    /// Writes the roots as they are now where a node that has joined finds them.
    pub(super) fn enrol(&self, directory: &Path) {
        let roots: Vec<_> = self.script().trusted.iter().map(|root| root.certificate.clone()).collect();
        std::fs::write(directory.join("bundle.pem"), super::pem(&roots)).unwrap();
    }

    fn answer<T>(&self, answer: impl FnOnce(&mut Script) -> T) -> Result<T, SourceError> {
        let mut script = self.script();
        script.calls += 1;
        if script.is_flaky && script.calls % 2 == 1 {
            return Err(SourceError::Unavailable("the cable is loose".to_owned()));
        }
        match script.outage.clone() {
            Some(error) => Err(error),
            None => Ok(answer(&mut script)),
        }
    }

    async fn hang(&self) {
        while self.script().hangs {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl CertificateSource for ScriptedSource {
    fn bundle(&self) -> Answer<'_, TrustBundle> {
        Box::pin(async move {
            self.answer(|script| TrustBundle {
                roots: script.trusted.iter().map(|root| root.certificate.clone()).collect(),
                version: script.epoch,
                epoch: script.epoch,
            })
        })
    }

    fn sign(&self, requests: Vec<SigningRequest>) -> Answer<'_, Vec<Result<SignedChain, SourceError>>> {
        Box::pin(async move {
            self.hang().await;
            self.answer(|script| {
                script.asked.push(requests.iter().map(|request| request.id.to_string()).collect());
                let life = i64::try_from(script.life.as_secs()).unwrap();
                let sign = |request: SigningRequest| {
                    if script.refused.iter().any(|end| request.id.as_str().ends_with(end)) {
                        let message = "no such workload on this node".to_owned();
                        return Err(SourceError::Refused { reason: "not_yours".to_owned(), message });
                    }
                    Ok(script.signer.sign(&request.csr, (-60, life)))
                };
                requests.into_iter().map(sign).collect()
            })
        })
    }
}
