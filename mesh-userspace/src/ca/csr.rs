//! Certificate signing requests: what the authority takes from one is the public key, and nothing else.

use super::{Reason, Refusal};
use rcgen::{
    CertificateParams, DistinguishedName, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SigningKey,
    SubjectPublicKeyInfo,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension};

/// Longest request read. One with a P-256 key and the longest SPIFFE ID has 2.5 KiB.
pub const MAX_CSR: usize = 4096;

/// ECDSA with SHA-256, no parameters, and the tag of the signature behind it: the one way to write them. They stand
/// outside of what is signed, and the parser is lenient about tags.
const SIGNATURE: [u8; 13] = [0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02, 0x03];

/// The public key of a request that proves to have its private half and asks for exactly `uri`.
///
/// # Errors
/// With the reason why it is not signed.
pub fn check(csr: &[u8], uri: &str) -> Result<SubjectPublicKeyInfo, Refusal> {
    let malformed = || Refusal::new(Reason::CsrMalformed, "the signing request is no PKCS #10 request");
    if csr.len() > MAX_CSR {
        return Err(malformed());
    }
    let Ok(([], request)) = X509CertificationRequest::from_der(csr) else { return Err(malformed()) };
    let key = &request.certification_request_info.subject_pki;
    let key = SubjectPublicKeyInfo::from_der(key.raw)
        .ok()
        .filter(|key| key.algorithm() == &PKCS_ECDSA_P256_SHA256)
        .ok_or_else(|| Refusal::new(Reason::CsrKey, "the key is not an ECDSA key of the curve P-256"))?;
    if !is_written_plainly(csr, request.certification_request_info.raw) || request.verify_signature().is_err() {
        return Err(Refusal::new(
            Reason::CsrSignature,
            "the request is not signed (ECDSA with SHA-256) by the key that it carries",
        ));
    }
    let names = || {
        Refusal::new(Reason::CsrNames, format!("the request must name {uri} as its one URI, and ask for nothing else"))
    };
    let [attribute] = request.certification_request_info.attributes() else { return Err(names()) };
    let ParsedCriAttribute::ExtensionRequest(asked) = attribute.parsed_attribute() else { return Err(names()) };
    let [extension] = &asked.extensions[..] else { return Err(names()) };
    let ParsedExtension::SubjectAlternativeName(alternatives) = extension.parsed_extension() else {
        return Err(names());
    };
    match alternatives.general_names[..] {
        [GeneralName::URI(named)] if named == uri => Ok(key),
        _ => Err(names()),
    }
}

/// Whether what surrounds the signed part is written as everybody writes it.
fn is_written_plainly(csr: &[u8], signed: &[u8]) -> bool {
    const SEQUENCE: u8 = 0x30;
    // The signed part is a part of the request: a header before it, the signature behind it.
    let start = (signed.as_ptr() as usize).saturating_sub(csr.as_ptr() as usize);
    let behind = csr.get(start + signed.len()..).unwrap_or_default();
    csr.first() == Some(&SEQUENCE) && behind.starts_with(&SIGNATURE)
}

/// A request for `uri`, signed by its key: what [`check`] accepts.
///
/// # Errors
/// If `uri` is no URI, or signing fails.
pub fn make(key: &impl SigningKey, uri: &str) -> Result<Vec<u8>, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    Ok(params.serialize_request(key)?.der().to_vec())
}
