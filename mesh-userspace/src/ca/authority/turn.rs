//! Changes of who signs: the steps of the rotation, and the intermediate's turn.

use super::Authority;
use crate::ca::certificate::{self, Made, Validity};
use crate::ca::key::Key;
use crate::ca::records::{IssuerRecord, NodeRecord, State};
use crate::ca::rotation::{Phase, Reported, Step, is_due};
use crate::ca::store::View;
use crate::ca::{CaError, Reason, Refusal};
use crate::model::TrustDomain;
use redb::WriteTransaction;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

type Change<'a> = View<'a, WriteTransaction>;

/// What can be rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotate {
    Root,
    Intermediate,
}

impl Authority {
    /// Begins a rotation, or with `force` takes its next step without waiting for anybody.
    ///
    /// # Errors
    /// If one is under way and `force` is not given.
    pub fn rotate(&self, what: Rotate, force: bool, now: OffsetDateTime) -> Result<(), CaError> {
        self.store.write(|change| {
            let mut state = change.state()?;
            match what {
                Rotate::Intermediate => {
                    self.renew_intermediate(change, &mut state, now)?;
                    // Who asks for it by hand does not want to wait for the old one's leaves to end.
                    state.epoch += 1;
                }
                Rotate::Root => {
                    let step = state.phase.request(force)?;
                    self.take(change, &mut state, &step, now)?;
                    if force && step == Step::Announce {
                        let next = state.phase.request(true)?;
                        self.take(change, &mut state, &next, now)?;
                    }
                }
            }
            change.put_state(&state)
        })?;
        tracing::info!(?what, force, "a rotation was asked for");
        self.refresh()
    }

    /// Does what is due: the intermediate's turn, the next step of a rotation, forgetting old tokens. Cheap if nothing
    /// is.
    ///
    /// # Errors
    /// If the store cannot be changed; calling again may help.
    pub fn tick(&self, now: OffsetDateTime) -> Result<(), CaError> {
        self.prune_tokens(now)?;
        if !self.store.read(|view| Ok(self.due(&view.state()?, &view.issuers()?, &view.nodes()?, now).is_some()))? {
            return Ok(());
        }
        self.store.write(|change| {
            let mut state = change.state()?;
            match self.due(&state, &change.issuers()?, &change.nodes()?, now) {
                Some(Due::Intermediate) => self.renew_intermediate(change, &mut state, now)?,
                Some(Due::Step(step)) => self.take(change, &mut state, &step, now)?,
                None => {}
            }
            change.put_state(&state)
        })?;
        self.refresh()
    }

    fn due(&self, state: &State, issuers: &[IssuerRecord], nodes: &[NodeRecord], now: OffsetDateTime) -> Option<Due> {
        let now = now.unix_timestamp();
        let signing = issuers.iter().find(|issuer| !issuer.is_root() && issuer.signs && issuer.root == state.root);
        if signing.is_none_or(|issuer| is_due(issuer.since, issuer.until, now)) {
            return Some(Due::Intermediate);
        }
        state.phase.poll(now, self.lives, nodes.iter().map(reported)).map(Due::Step)
    }

    fn take(&self, change: &Change<'_>, state: &mut State, step: &Step, now: OffsetDateTime) -> Result<(), CaError> {
        let seconds = now.unix_timestamp();
        match *step {
            Step::Announce => {
                let root = certificate::root(&self.trust_domain, now)?;
                let incoming = add_root(change, state, &root, now)?;
                state.version += 1;
                state.phase = Phase::announced(incoming, state.version, seconds, self.lives);
                tracing::info!(
                    version = state.version,
                    "a new root is in the bundle; it signs once every node uses it"
                );
            }
            Step::Switch { incoming } => {
                let outgoing = state.root;
                state.root = incoming;
                self.renew_intermediate(change, state, now)?;
                state.epoch += 1;
                state.phase = Phase::retiring(outgoing, seconds, state.longest_leaf.max(self.lives.longest()));
                tracing::info!(epoch = state.epoch, "the new root signs; nodes are told to renew");
            }
            Step::Retire { outgoing } => {
                for issuer in change.issuers()?.iter().filter(|issuer| issuer.root == outgoing) {
                    change.remove_issuer(issuer.number)?;
                }
                state.version += 1;
                state.longest_leaf = self.lives.longest();
                state.phase = Phase::Steady;
                tracing::info!(version = state.version, "the old root has left the bundle");
            }
        }
        Ok(())
    }

    /// A new intermediate signs below the active root. The old one stays valid, and what it signed with it.
    fn renew_intermediate(&self, change: &Change<'_>, state: &mut State, now: OffsetDateTime) -> Result<(), CaError> {
        let issuers = change.issuers()?;
        let root = issuers.iter().find(|issuer| issuer.number == state.root);
        let root = root.ok_or_else(|| Refusal::new(Reason::Internal, "the signing root is missing in the store"))?;
        let key = change.key(root.number)?;
        let key = key.ok_or_else(|| Refusal::new(Reason::Internal, "the signing root has no key in the store"))?;
        let root = Made { certificate: CertificateDer::from(root.certificate.clone()), key: Key::from_der(&key)? };
        let seconds = now.unix_timestamp();
        for mut old in issuers.into_iter().filter(|issuer| !issuer.is_root() && issuer.root == state.root) {
            if old.until <= seconds {
                change.remove_issuer(old.number)?;
            } else if old.signs {
                old.signs = false;
                change.put_issuer(&old)?;
                change.remove_key(old.number)?;
            }
        }
        add_intermediate(change, state, &self.trust_domain, &root, now)?;
        tracing::info!("a new intermediate certificate signs");
        Ok(())
    }
}

enum Due {
    Intermediate,
    Step(Step),
}

pub(super) fn reported(node: &NodeRecord) -> Reported<'_> {
    Reported { node: &node.name, revoked: node.revoked.is_some(), seen: node.seen, bundle: node.bundle }
}

/// Stores a root; returns its number.
pub(super) fn add_root(
    change: &Change<'_>,
    state: &mut State,
    root: &Made,
    now: OffsetDateTime,
) -> Result<u64, CaError> {
    let number = state.next;
    add(change, state, root, number, now)
}

/// Stores a new intermediate of the root that signs.
pub(super) fn add_intermediate(
    change: &Change<'_>,
    state: &mut State,
    trust_domain: &TrustDomain,
    root: &Made,
    now: OffsetDateTime,
) -> Result<u64, CaError> {
    let made = certificate::intermediate(trust_domain, root, now)?;
    add(change, state, &made, state.root, now)
}

fn add(change: &Change<'_>, state: &mut State, made: &Made, root: u64, now: OffsetDateTime) -> Result<u64, CaError> {
    let number = state.next;
    state.next += 1;
    let validity = Validity::of(&made.certificate);
    let validity = validity.ok_or_else(|| Refusal::new(Reason::Internal, "a fresh certificate cannot be read"))?;
    change.put_issuer(&IssuerRecord {
        number,
        root,
        certificate: made.certificate.to_vec(),
        since: now.unix_timestamp(),
        until: validity.not_after.unix_timestamp(),
        signs: true,
    })?;
    change.put_key(number, &made.key.to_der())?;
    Ok(number)
}
