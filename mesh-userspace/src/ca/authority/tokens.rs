//! Join tokens: made, listed, taken back, forgotten.

use super::Authority;
use crate::ca::digest::Digest;
use crate::ca::key::random;
use crate::ca::records::{Seconds, TokenRecord, TokenState};
use crate::ca::rotation::seconds;
use crate::ca::token::{Token, TokenId};
use crate::ca::{CaError, Reason, Refusal};
use crate::model::NodeName;
use std::time::Duration;
use time::OffsetDateTime;
use zeroize::Zeroizing;

/// How long a token may be used unless told otherwise.
pub const DEFAULT_TOKEN_TTL: Duration = Duration::from_hours(1);
/// The longest that a token may be used.
pub const MAX_TOKEN_TTL: Duration = Duration::from_hours(24);
/// Tokens on record at once.
const MAX_TOKENS: usize = 10_000;
/// How long a token stays on record after its end, so that a late use gets the right answer.
const KEPT: Seconds = 24 * 60 * 60;

/// A token as it is given out, once.
#[derive(Debug)]
pub struct NewToken {
    pub token: Token,
    pub node: Option<NodeName>,
    pub expires: OffsetDateTime,
}

impl Authority {
    /// Makes a token that lets one node join, once, within `ttl`; only `node`, if one is named.
    ///
    /// # Errors
    /// If `ttl` is less than a second or more than [`MAX_TOKEN_TTL`], or too many tokens are on record.
    pub fn create_token(
        &self,
        ttl: Duration,
        node: Option<&NodeName>,
        now: OffsetDateTime,
    ) -> Result<NewToken, CaError> {
        if ttl < Duration::from_secs(1) || ttl > MAX_TOKEN_TTL {
            let hours = MAX_TOKEN_TTL.as_secs() / 3600;
            let message = format!("a token may be used for 1 s to {hours} h");
            return Err(Refusal::new(Reason::Lifetime, message).into());
        }
        let root = self.live().active()?.root_digest;
        let token = Token::new(root, TokenId::from_random(random()?), Zeroizing::new(random()?));
        let created = now.unix_timestamp();
        let record = TokenRecord {
            id: token.id().to_string(),
            hash: token.secret_hash().as_bytes().to_vec(),
            node: node.map(ToString::to_string),
            created,
            expires: created + seconds(ttl),
            state: TokenState::Open,
        };
        self.store.write(|change| {
            if change.tokens()?.len() >= MAX_TOKENS {
                let message = format!("{MAX_TOKENS} tokens are on record; old ones go a day after their end");
                return Err(Refusal::new(Reason::Full, message).into());
            }
            change.put_token(&record)
        })?;
        tracing::info!(token = record.id, node = record.node, expires = record.expires, "a join token was made");
        Ok(NewToken { token, node: node.cloned(), expires: now + ttl })
    }

    /// Takes a token back that has not been used.
    ///
    /// # Errors
    /// If there is none, or it was used.
    pub fn revoke_token(&self, id: &TokenId, now: OffsetDateTime) -> Result<(), CaError> {
        self.store.write(|change| {
            let token = change.token(id.as_str())?;
            let mut token =
                token.ok_or_else(|| Refusal::new(Reason::TokenUnknown, format!("there is no token {id}")))?;
            match &token.state {
                TokenState::Used { node, .. } => {
                    let message = format!("node {node} has used it: `nodemesh node revoke {node}` shuts the node out");
                    return Err(Refusal::new(Reason::TokenUsed, message).into());
                }
                TokenState::Revoked { .. } => return Ok(()),
                TokenState::Open => token.state = TokenState::Revoked { at: now.unix_timestamp() },
            }
            change.put_token(&token)
        })?;
        tracing::info!(token = id.as_str(), "a join token was revoked");
        Ok(())
    }

    /// Forgets tokens whose end is long past.
    pub(super) fn prune_tokens(&self, now: OffsetDateTime) -> Result<(), CaError> {
        let past = |token: &TokenRecord| token.expires + KEPT < now.unix_timestamp();
        if !self.store.read(|view| Ok(view.tokens()?.iter().any(past)))? {
            return Ok(());
        }
        self.store.write(|change| {
            for token in change.tokens()?.iter().filter(|token| past(token)) {
                change.remove_token(&token.id)?;
            }
            Ok(())
        })
    }
}

/// Whether `token` may let `node` join now. Says no more than that to whoever does not know the secret.
pub(super) fn admit(record: Option<&TokenRecord>, token: &Token, node: &NodeName, now: Seconds) -> Result<(), Refusal> {
    let sound =
        record.filter(|record| Digest::from_bytes(&record.hash).is_some_and(|hash| token.has_secret_hash(&hash)));
    let Some(record) = sound else {
        return Err(Refusal::new(Reason::TokenUnknown, "no token has this id and this secret"));
    };
    match &record.state {
        TokenState::Used { node, .. } => {
            let message = format!("node {node} has used this token, and a token works once: make another one");
            return Err(Refusal::new(Reason::TokenUsed, message));
        }
        TokenState::Revoked { .. } => return Err(Refusal::new(Reason::TokenRevoked, "this token was revoked")),
        TokenState::Open => {}
    }
    if now >= record.expires {
        return Err(Refusal::new(Reason::TokenExpired, "this token has expired: make another one"));
    }
    match &record.node {
        Some(bound) if bound != node.as_str() => {
            let message = format!("this token is for node {bound} only, not for {node}");
            Err(Refusal::new(Reason::TokenOtherNode, message))
        }
        _ => Ok(()),
    }
}
