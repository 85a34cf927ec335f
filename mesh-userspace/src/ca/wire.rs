//! What nodes and the authority say to each other: JSON, bytes in base64.

use serde::{Deserialize, Serialize};

/// Bytes as a base64 text.
pub(super) mod base64 {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map_err(D::Error::custom)
    }
}

/// Bytes, base64 in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Bytes(#[serde(with = "base64")] pub(super) Vec<u8>);

/// `POST /v1/join`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JoinRequest {
    pub(super) token: String,
    pub(super) node: String,
    pub(super) csr: Bytes,
}

#[derive(Serialize, Deserialize)]
pub(super) struct JoinAnswer {
    pub(super) chain: Vec<Bytes>,
    pub(super) bundle: BundleAnswer,
}

/// `POST /v1/renew`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RenewRequest {
    pub(super) csr: Bytes,
}

#[derive(Serialize, Deserialize)]
pub(super) struct RenewAnswer {
    pub(super) chain: Vec<Bytes>,
}

/// `POST /v1/sign`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SignRequest {
    pub(super) requests: Vec<IdentityRequest>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IdentityRequest {
    pub(super) id: String,
    pub(super) csr: Bytes,
}

/// One answer for each request, in their order.
#[derive(Serialize, Deserialize)]
pub(super) struct SignAnswer {
    pub(super) answers: Vec<IdentityAnswer>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum IdentityAnswer {
    Chain(Vec<Bytes>),
    Refused(RefusalAnswer),
}

/// `GET /v1/bundle?have=VERSION`: what version of it the node uses so far.
#[derive(Serialize, Deserialize)]
pub(super) struct BundleAnswer {
    pub(super) roots: Vec<Bytes>,
    pub(super) version: u64,
    pub(super) epoch: u64,
}

/// The body of every answer that is no success.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct RefusalAnswer {
    pub(super) reason: String,
    pub(super) message: String,
}
