//! Join tokens: `mj1.<hash of the root's public key>.<id>.<secret>`.
//!
//! The hash lets a joining node know its authority before it says the secret; the id lets the authority find the token
//! without the secret, of which it keeps a hash only.

use super::digest::{Digest, sha256};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::fmt;
use std::str::FromStr;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

const VERSION: &str = "mj1";
/// Bytes of a token's id.
const ID: usize = 8;
/// Bytes of a token's secret: 128 bits.
const SECRET: usize = 16;

/// Why a text is no token. It never repeats the text, which may hold a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no join token: {0}; copy the whole line that `nodemesh node token create` printed")]
pub struct InvalidToken(&'static str);

/// A token's public name: 16 lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(String);

impl TokenId {
    pub(super) fn from_random(bytes: [u8; ID]) -> Self {
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// # Errors
    /// If it is not of the form in which ids are made.
    pub fn parse(text: &str) -> Result<Self, InvalidToken> {
        let sound = text.len() == 2 * ID && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'));
        if sound { Ok(Self(text.to_owned())) } else { Err(InvalidToken("its id is not 16 hexadecimal digits")) }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A whole token. Its secret is wiped from memory when it is dropped, and never shown by `Debug`.
#[derive(Clone)]
pub struct Token {
    root: Digest,
    id: TokenId,
    secret: Zeroizing<[u8; SECRET]>,
}

impl Token {
    pub(super) fn new(root: Digest, id: TokenId, secret: Zeroizing<[u8; SECRET]>) -> Self {
        Self { root, id, secret }
    }

    /// Hash of the public key (SubjectPublicKeyInfo) of the root that the authority must come from.
    #[must_use]
    pub fn root(&self) -> Digest {
        self.root
    }

    #[must_use]
    pub fn id(&self) -> &TokenId {
        &self.id
    }

    /// What the authority keeps of the secret. A plain hash is enough: 128 random bits cannot be guessed.
    pub(super) fn secret_hash(&self) -> Digest {
        sha256(self.secret.as_ref())
    }

    /// Compares in constant time: how much of a guess was right is not told.
    pub(super) fn has_secret_hash(&self, hash: &Digest) -> bool {
        self.secret_hash().as_bytes().ct_eq(hash.as_bytes()).into()
    }

    /// The text that joins a node. Whoever has it can join.
    #[must_use]
    pub fn reveal(&self) -> Zeroizing<String> {
        let secret = Zeroizing::new(URL_SAFE_NO_PAD.encode(self.secret.as_ref()));
        Zeroizing::new(format!("{VERSION}.{}.{}.{}", self.root.to_base64url(), self.id, *secret))
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let mut parts = text.split('.');
        if parts.next() != Some(VERSION) {
            return Err(InvalidToken("it does not start with mj1."));
        }
        let (Some(root), Some(id), Some(secret), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidToken("it has not four parts with dots between"));
        };
        let root = Digest::from_base64url(root).ok_or(InvalidToken("its second part is no hash"))?;
        let id = TokenId::parse(id)?;
        let mut bytes = Zeroizing::new([0; SECRET]);
        // A buffer of the exact size: the decoder would rather refuse than cut.
        match URL_SAFE_NO_PAD.decode_slice(secret, bytes.as_mut()) {
            Ok(SECRET) => Ok(Self { root, id, secret: bytes }),
            _ => Err(InvalidToken("its secret has not 22 letters")),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token::new(sha256(b"root"), TokenId::from_random([0xab; 8]), Zeroizing::new([7; 16]))
    }

    #[test]
    fn a_token_survives_being_written_down() {
        let text = token().reveal();
        assert_eq!(text.len(), 4 + 43 + 1 + 16 + 1 + 22);
        let read: Token = text.parse().unwrap();
        assert_eq!((read.root(), read.id().as_str()), (sha256(b"root"), "abababababababab"));
        assert!(read.has_secret_hash(&token().secret_hash()));
        assert!(!read.has_secret_hash(&sha256(b"another")));
        assert!(!format!("{read:?}").contains(text.rsplit('.').next().unwrap()));
    }

    #[test]
    fn a_mangled_token_is_refused_without_repeating_it() {
        let text = token().reveal();
        let parts: Vec<&str> = text.split('.').collect();
        for bad in [
            String::new(),
            "mj1".to_owned(),
            format!("mj2.{}.{}.{}", parts[1], parts[2], parts[3]),
            format!("mj1.{}.{}", parts[1], parts[2]),
            format!("{}.x", *text),
            format!("{}=", *text),
            format!(" {}", *text),
            format!("{}\n", *text),
            format!("mj1.{}.{}.{}", &parts[1][1..], parts[2], parts[3]),
            format!("mj1.{}.{}.{}", parts[1], parts[2].to_uppercase(), parts[3]),
            format!("mj1.{}.{}.{}", parts[1], parts[2], &parts[3][1..]),
            // The same bytes in another spelling: the last letter's unused bits are set.
            format!("mj1.{}.{}.{}x", parts[1], parts[2], &parts[3][..21]),
        ] {
            let error = bad.parse::<Token>().unwrap_err().to_string();
            assert!(!error.contains(parts[3]) && error.contains("node token create"), "{error}");
        }
    }
}
