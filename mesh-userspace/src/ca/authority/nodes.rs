//! Nodes: how they join, prove themselves, renew, and are shut out.

use super::{Authority, tokens};
use crate::ca::certificate::{BACK_DATED, Profile, Validity};
use crate::ca::records::{NodeRecord, Seconds, TokenState};
use crate::ca::rotation::seconds;
use crate::ca::token::Token;
use crate::ca::{CaError, Reason, Refusal, csr};
use crate::identity::certificate::uris_of;
use crate::identity::{SignedChain, TrustBundle};
use crate::model::{NodeId, NodeName, SpiffeId};
use rcgen::PublicKeyData;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

/// Nodes on record at once, revoked ones included.
const MAX_NODES: usize = 100_000;
/// How exactly a node's last sign of life is stored: not every request is worth a write to the disk.
const SEEN_EVERY: Seconds = 60;

/// What a node gets that has joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    pub chain: SignedChain,
    pub bundle: TrustBundle,
}

impl Authority {
    /// Lets a node join: the token is used up, the node on record and its certificate made, or none of the three.
    ///
    /// # Errors
    /// With the reason of the refusal.
    pub fn join(&self, token: &Token, node: &NodeName, request: &[u8], now: OffsetDateTime) -> Result<Joined, CaError> {
        let id = self.node_id(node);
        let seconds = now.unix_timestamp();
        let joined = self.store.write(|change| {
            let record = change.token(token.id().as_str())?;
            tokens::admit(record.as_ref(), token, node, seconds)?;
            let mut record = record.ok_or_else(|| Refusal::new(Reason::TokenUnknown, "no token has this id"))?;
            if let Some(known) = change.node(node.as_str())?
                && record.node.is_none()
            {
                return Err(taken(&known).into());
            }
            if change.nodes()?.len() >= MAX_NODES {
                return Err(Refusal::new(Reason::Full, format!("{MAX_NODES} nodes are on record")).into());
            }
            let key = csr::check(request, &id)?;
            let (chain, until) = self.node_certificate(&id, &key, now)?;
            record.state = TokenState::Used { node: node.to_string(), at: seconds };
            change.put_token(&record)?;
            change.put_node(&fresh(node, seconds, until))?;
            Ok(Joined { chain, bundle: self.bundle() })
        })?;
        tracing::info!(%node, token = token.id().as_str(), "a node has joined");
        Ok(joined)
    }

    /// Lets the node join on which this process runs: who may read the authority's keys needs no token.
    ///
    /// # Errors
    /// If the node is revoked, or the store cannot be changed.
    pub fn enrol(&self, node: &NodeName, key: &impl PublicKeyData, now: OffsetDateTime) -> Result<Joined, CaError> {
        let id = self.node_id(node);
        self.store.write(|change| {
            if let Some(known) = change.node(node.as_str())?.filter(|known| known.revoked.is_some()) {
                return Err(taken(&known).into());
            }
            let (chain, until) = self.node_certificate(&id, key, now)?;
            change.put_node(&fresh(node, now.unix_timestamp(), until))?;
            Ok(Joined { chain, bundle: self.bundle() })
        })
    }

    /// The node that a verified client certificate stands for.
    ///
    /// # Errors
    /// If it is no node's, has ended, is from before the node's last join, or the node is revoked or unknown.
    pub fn authenticate(&self, leaf: &CertificateDer<'_>, now: OffsetDateTime) -> Result<NodeName, CaError> {
        let not_a_node = || {
            let message = "only nodes may ask this, each with the certificate that it got when it joined";
            Refusal::new(Reason::NotANode, message)
        };
        let uris = uris_of(leaf).unwrap_or_default();
        let [uri] = &uris[..] else { return Err(not_a_node().into()) };
        let id = NodeId::parse(uri).filter(|id| *id.trust_domain() == self.trust_domain).ok_or_else(not_a_node)?;
        let node = id.node();
        let record = self.store.read(|view| view.node(node.as_str()))?;
        let record = record
            .ok_or_else(|| Refusal::new(Reason::NodeUnknown, format!("node {node} is not on record: join again")))?;
        if record.revoked.is_some() {
            return Err(taken(&record).into());
        }
        let validity = Validity::of(leaf).ok_or_else(not_a_node)?;
        let stale = |message| CaError::from(Refusal::new(Reason::CertificateStale, message));
        // TLS has looked at the clock when the connection began; it may have been open for long.
        if now > validity.not_after {
            return Err(stale("the node's certificate has expired: join again"));
        }
        let made = validity.not_before + BACK_DATED;
        if made.unix_timestamp() < record.joined {
            return Err(stale("the node has joined anew since this certificate was made"));
        }
        Ok(node.clone())
    }

    /// Notes that a node has shown itself, and which version of the bundle it uses. Says whether that is another one.
    ///
    /// # Errors
    /// If the store cannot be changed.
    pub fn saw(&self, node: &NodeName, bundle: u64, now: OffsetDateTime) -> Result<bool, CaError> {
        let now = now.unix_timestamp();
        // What it cannot have got, it does not use.
        let bundle = bundle.min(self.live().state.version);
        // A rotation waits for nodes that were seen within a node certificate's life: short lives need fresh notes.
        let every = SEEN_EVERY.min(seconds(self.lives.node) / 4);
        let fresh = |record: &NodeRecord| record.bundle == bundle && now - record.seen < every;
        if self.store.read(|view| view.node(node.as_str()))?.as_ref().is_some_and(fresh) {
            return Ok(false);
        }
        self.store.write(|change| {
            let Some(record) = change.node(node.as_str())? else { return Ok(false) };
            let is_another = record.bundle != bundle;
            change.put_node(&NodeRecord { seen: record.seen.max(now), bundle, ..record })?;
            Ok(is_another)
        })
    }

    /// A new certificate for a node that has proved itself.
    ///
    /// # Errors
    /// With the reason of the refusal.
    pub fn renew(&self, node: &NodeName, request: &[u8], now: OffsetDateTime) -> Result<SignedChain, CaError> {
        let id = self.node_id(node);
        let key = csr::check(request, &id)?;
        let (chain, until) = self.node_certificate(&id, &key, now)?;
        self.store.write(|change| match change.node(node.as_str())? {
            Some(record) if record.revoked.is_none() => {
                change.put_node(&NodeRecord { until, seen: record.seen.max(now.unix_timestamp()), ..record })
            }
            Some(record) => Err(taken(&record).into()),
            None => Err(Refusal::new(Reason::NodeUnknown, format!("node {node} is not on record: join again")).into()),
        })?;
        Ok(chain)
    }

    /// A workload's certificate. Whether the node may have it is decided before.
    ///
    /// # Errors
    /// With the reason of the refusal.
    pub fn sign_request(&self, id: &SpiffeId, request: &[u8], now: OffsetDateTime) -> Result<SignedChain, CaError> {
        if id.trust_domain() != self.trust_domain.as_str() {
            let message = format!("{id} is not of this trust domain, {}", self.trust_domain);
            return Err(Refusal::new(Reason::ForeignIdentity, message).into());
        }
        let key = csr::check(request, id.as_str())?;
        self.sign_leaf(Profile::Workload, id.as_str(), &key, Validity::starting_at(now, self.lives.workload)?)
    }

    /// Shuts a node out: it gets nothing any more. What it has ends by itself.
    ///
    /// # Errors
    /// If the node is unknown.
    pub fn revoke_node(&self, node: &NodeName, now: OffsetDateTime) -> Result<(), CaError> {
        self.store.write(|change| {
            let record = change.node(node.as_str())?;
            let record =
                record.ok_or_else(|| Refusal::new(Reason::NodeUnknown, format!("node {node} is not on record")))?;
            let revoked = record.revoked.or(Some(now.unix_timestamp()));
            change.put_node(&NodeRecord { revoked, ..record })
        })?;
        tracing::info!(%node, "a node was revoked");
        Ok(())
    }

    fn node_id(&self, node: &NodeName) -> String {
        NodeId::new(self.trust_domain.clone(), node.clone()).to_string()
    }

    /// A node's certificate, and when it ends.
    fn node_certificate(
        &self,
        id: &str,
        key: &impl PublicKeyData,
        now: OffsetDateTime,
    ) -> Result<(SignedChain, Seconds), CaError> {
        let chain = self.sign_leaf(Profile::Node, id, key, Validity::starting_at(now, self.lives.node)?)?;
        let until = Validity::of(&chain.0[0])
            .map_or(now.unix_timestamp() + seconds(self.lives.node), |validity| validity.not_after.unix_timestamp());
        Ok((chain, until))
    }
}

fn fresh(node: &NodeName, now: Seconds, until: Seconds) -> NodeRecord {
    NodeRecord { name: node.to_string(), revoked: None, joined: now, seen: now, bundle: 0, until }
}

/// Why a name that is on record is not given out for the asking.
fn taken(record: &NodeRecord) -> Refusal {
    let name = &record.name;
    if record.revoked.is_some() {
        let message = format!(
            "node {name} is revoked; to let it join again, make a token for it: `node token create --node {name}`"
        );
        return Refusal::new(Reason::NodeRevoked, message);
    }
    let message = format!(
        "a node {name} has joined already; to replace it, make a token for it: `node token create --node {name}`"
    );
    Refusal::new(Reason::NodeExists, message)
}
