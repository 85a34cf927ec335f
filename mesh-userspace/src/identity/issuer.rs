//! The task that gets certificates: asks the authority when the schedule says so, checks what comes, puts it to use.

use super::identities::Wanted;
use super::locals::Local;
use super::renewal::{Alarm, Attempt, Now, Renewal};
use super::request::Request;
use super::source::{CertificateSource, SignedChain, SigningRequest, SourceError, TrustBundle};
use super::{Identities, Issuance, Orders, State};
use crate::model::SpiffeId;
use crate::runtime::{Blocker, Ready};
use crate::telemetry::certificates::CertificateMetrics;
use anyhow::{Context as _, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::task::JoinSet;

/// Identities in one call.
const BATCH: usize = 64;
/// Calls at once: one that hangs must not keep a workload that has just arrived waiting.
const CALLS: usize = 4;
/// A call without an answer is given up after this. Sources bound their own waiting: this is the last resort.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// The clock on the wall may be set: it is looked at this often at least.
const LOOK: Duration = Duration::from_secs(10);
/// Pause after the bundle could not be fetched.
const BUNDLE_RETRY: Duration = Duration::from_secs(1);

const AWAITED: &str = "certificates of this node's workloads are awaited from the certificate authority";
const UNREACHABLE: &str = "the certificate authority cannot be reached, and workloads of this node have no certificate";

/// Gets certificates for as long as the node runs. Keys are made here, live in memory only, and are new for every
/// certificate.
pub struct Issuer {
    identities: Identities,
    orders: Orders,
    source: Arc<dyn CertificateSource>,
    metrics: CertificateMetrics,
    schedule: Renewal,
    calls: JoinSet<Answered>,
    /// Signing calls among them.
    signing: usize,
    bundle: BundleState,
    readiness: Readiness,
    /// The authority did not answer when last asked.
    is_unavailable: bool,
}

/// When the bundle was, and will be, asked for.
struct BundleState {
    /// `None` while a call is under way.
    next: Option<Instant>,
    /// Certificates are not asked for before: it says under which epoch they come.
    is_known: bool,
}

/// Holds readiness back until the identities of the first snapshot have had an answer each.
struct Readiness {
    ready: Ready,
    blocker: Option<Blocker>,
    first: Option<Arc<Wanted>>,
}

/// What came of a call.
enum Answered {
    Bundle(Result<TrustBundle, SourceError>),
    Signed {
        asked: Vec<(Attempt, Request)>,
        epoch: u64,
        answers: Result<Vec<Result<SignedChain, SourceError>>, SourceError>,
    },
}

impl Issuer {
    /// `orders` are those of `identities` ([`Identities::issued`]).
    #[must_use]
    pub fn new(
        identities: Identities,
        orders: Orders,
        source: Arc<dyn CertificateSource>,
        metrics: CertificateMetrics,
        ready: Ready,
    ) -> Self {
        let readiness = Readiness { blocker: Some(ready.block(AWAITED)), ready, first: None };
        Self {
            identities,
            orders,
            source,
            metrics,
            schedule: Renewal::default(),
            calls: JoinSet::new(),
            signing: 0,
            bundle: BundleState { next: Some(Instant::now()), is_known: false },
            readiness,
            is_unavailable: false,
        }
    }

    /// Never ends by itself.
    ///
    /// # Errors
    /// If a call panicked.
    pub async fn run(mut self) -> Result<()> {
        loop {
            self.call();
            self.tell();
            let wait = self.wait();
            tokio::select! {
                changed = self.orders.wanted.changed() => {
                    changed.context("nobody says any more which identities are wanted")?;
                    self.want();
                }
                Some(only) = self.orders.rotations.recv() => self.schedule.rotate(only.as_ref(), now()),
                Some(answered) = self.calls.join_next() => self.handle(answered.context("a call to the authority")?),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn want(&mut self) {
        let Some(wanted) = self.orders.wanted.borrow_and_update().clone() else { return };
        let gone = self.schedule.want(&wanted.ids);
        if !gone.is_empty() {
            self.identities.remove(&gone);
        }
        self.readiness.first.get_or_insert(wanted);
    }

    /// Starts the calls that are due.
    fn call(&mut self) {
        if self.bundle.next.is_some_and(|at| at <= Instant::now()) {
            self.bundle.next = None;
            let (source, metrics) = (self.source.clone(), self.metrics.clone());
            self.calls.spawn(async move { Answered::Bundle(timed("bundle", &metrics, source.bundle()).await) });
        }
        while self.bundle.is_known && self.signing < CALLS {
            let due = self.schedule.take_due(now(), BATCH);
            if due.is_empty() {
                return;
            }
            self.sign(due);
        }
    }

    fn sign(&mut self, due: Vec<Attempt>) {
        let (mut asked, mut requests) =
            (Vec::with_capacity(due.len()), Vec::<SigningRequest>::with_capacity(due.len()));
        for attempt in due {
            match Request::new(&attempt.id) {
                Ok((request, signing)) => {
                    asked.push((attempt, request));
                    requests.push(signing);
                }
                Err(error) => self.fail(&attempt, &SourceError::Invalid(error.to_string())),
            }
        }
        if requests.is_empty() {
            return;
        }
        let (source, metrics, epoch) = (self.source.clone(), self.metrics.clone(), self.schedule.epoch());
        self.signing += 1;
        self.calls.spawn(async move {
            let answers = timed("sign", &metrics, source.sign(requests)).await;
            Answered::Signed { asked, epoch, answers }
        });
    }

    fn handle(&mut self, answered: Answered) {
        match answered {
            Answered::Bundle(answer) => self.handle_bundle(answer),
            Answered::Signed { asked, epoch, answers } => {
                self.signing -= 1;
                self.handle_signed(asked, epoch, answers);
            }
        }
    }

    fn handle_bundle(&mut self, answer: Result<TrustBundle, SourceError>) {
        self.notice(answer.as_ref().err());
        let trusted = answer.and_then(|TrustBundle { roots, version, epoch }| {
            let is_new = self.identities.trust(roots, version);
            is_new.map(|is_new| (is_new, version, epoch)).map_err(|error| SourceError::Invalid(error.to_string()))
        });
        let pause = match trusted {
            Ok((is_new, version, epoch)) => {
                self.bundle.is_known = true;
                if is_new {
                    tracing::info!(version, epoch, "the mesh's roots have changed");
                    let orphans = self.identities.orphans(OffsetDateTime::now_utc());
                    orphans.iter().for_each(|id| self.schedule.rotate(Some(id), now()));
                }
                self.schedule.set_epoch(epoch, now(), rand::random::<f64>);
                self.schedule.bundle_interval()
            }
            Err(error) => {
                if !matches!(error, SourceError::Unavailable(_)) {
                    tracing::warn!(%error, "the mesh's roots cannot be fetched; those in use stay");
                }
                BUNDLE_RETRY.mul_f64(0.8 + 0.4 * rand::random::<f64>())
            }
        };
        self.bundle.next = Some(Instant::now() + pause);
    }

    fn handle_signed(
        &mut self,
        asked: Vec<(Attempt, Request)>,
        epoch: u64,
        answers: Result<Vec<Result<SignedChain, SourceError>>, SourceError>,
    ) {
        self.notice(answers.as_ref().err());
        let answers = answers.and_then(|answers| match answers.len() == asked.len() {
            true => Ok(answers),
            false => Err(SourceError::Invalid(format!("{} answers to {} requests", answers.len(), asked.len()))),
        });
        let answers = answers.unwrap_or_else(|error| vec![Err(error); asked.len()]);
        let (roots, mut taken) = (self.identities.roots(), Vec::<(Attempt, Local)>::new());
        for ((attempt, request), answer) in asked.into_iter().zip(answers) {
            if !self.schedule.awaits(&attempt) {
                // Its workload has gone meanwhile.
                continue;
            }
            match answer.and_then(|chain| request.accept(chain, &roots, OffsetDateTime::now_utc())) {
                Ok(local) => taken.push((attempt, local)),
                Err(error) => self.fail(&attempt, &error),
            }
        }
        self.take(taken, epoch);
    }

    fn take(&mut self, taken: Vec<(Attempt, Local)>, epoch: u64) {
        let (attempts, locals): (Vec<_>, Vec<_>) =
            taken.into_iter().map(|(attempt, local)| ((attempt, local.certificate.clone()), local)).unzip();
        if !locals.is_empty() {
            self.identities.put(locals);
        }
        for (attempt, certificate) in attempts {
            tracing::debug!(id = %attempt.id, serial = certificate.serial, not_after = %certificate.not_after, "certificate issued");
            self.schedule.issued(&attempt, certificate.not_after, epoch, now(), rand::random());
            self.metrics.rotated("success");
        }
        // The first look at the bundle came before anybody knew how long certificates live.
        let soon = Instant::now() + self.schedule.bundle_interval();
        self.bundle.next = self.bundle.next.map(|next| next.min(soon));
    }

    fn fail(&mut self, attempt: &Attempt, error: &SourceError) {
        self.metrics.rotated(error.reason());
        match error {
            // Said once for all identities, in `notice`.
            SourceError::Unavailable(_) => {}
            SourceError::Refused { .. } | SourceError::Invalid(_) => {
                let is_new = self.schedule.last_error(&attempt.id) != Some(error.to_string().as_str());
                if is_new {
                    tracing::warn!(id = %attempt.id, %error, "no certificate; will try again");
                }
            }
        }
        if matches!(error, SourceError::Invalid(_)) {
            // The authority may sign under a root that is not known here yet.
            let soon = Instant::now() + BUNDLE_RETRY;
            self.bundle.next = self.bundle.next.map(|next| next.min(soon));
        }
        let is_answer = matches!(error, SourceError::Refused { .. });
        self.schedule.failed(attempt, error.to_string(), is_answer, now(), rand::random());
    }

    /// Logs when the authority falls silent, and when it speaks again.
    fn notice(&mut self, error: Option<&SourceError>) {
        let unavailable = error.filter(|error| matches!(error, SourceError::Unavailable(_)));
        match (unavailable, self.is_unavailable) {
            (Some(error), false) => tracing::warn!(%error, "certificates in use stay in use; will try again"),
            (None, true) => tracing::info!("the certificate authority answers again"),
            _ => {}
        }
        self.is_unavailable = unavailable.is_some();
    }

    /// Readiness, log and status.
    fn tell(&mut self) {
        let schedule = &self.schedule;
        self.readiness.look(schedule, self.is_unavailable);
        for (id, alarm) in self.schedule.alarms(now()) {
            match alarm {
                Alarm::Late => tracing::warn!(%id, "30 % of the certificate's life is left, and it is not renewed"),
                Alarm::Urgent => tracing::warn!(%id, "10 % of the certificate's life is left, and it is not renewed"),
                Alarm::Expired => tracing::error!(%id, "the certificate has expired: peers refuse this identity"),
            }
        }
        self.identities.report(states(&self.schedule, now()));
    }

    fn wait(&self) -> Duration {
        let bundle = self.bundle.next.map(|at| at.saturating_duration_since(Instant::now()));
        let can_sign = self.bundle.is_known && self.signing < CALLS;
        let signing = if can_sign { self.schedule.wait(now()) } else { None };
        [bundle, signing].into_iter().flatten().fold(LOOK, Duration::min)
    }
}

impl Readiness {
    fn look(&mut self, schedule: &Renewal, is_unavailable: bool) {
        if self.blocker.is_none() {
            return;
        }
        if self.first.as_ref().is_some_and(|first| schedule.is_answered(&first.ids)) {
            self.blocker = None;
        } else {
            // The new one first: in between the node would be ready.
            self.blocker = Some(self.ready.block(if is_unavailable { UNREACHABLE } else { AWAITED }));
        }
    }
}

/// How each identity is doing.
fn states(schedule: &Renewal, now: Now) -> BTreeMap<SpiffeId, Issuance> {
    let state = |entry: &super::renewal::Entry| match entry.held() {
        None => State::Pending,
        Some(held) if held.not_after < now.wall => State::Expired,
        Some(_) if entry.last_error().is_some() => State::Late,
        Some(_) => State::Valid,
    };
    let issuance = |entry: &super::renewal::Entry| Issuance {
        state: state(entry),
        next_renewal: entry.wait(now).map(|wait| now.wall + wait),
        last_error: entry.last_error().map(str::to_owned),
    };
    schedule.entries().map(|(id, entry)| (id.clone(), issuance(entry))).collect()
}

/// Awaits an answer for a bounded time, and counts it.
async fn timed<T>(
    operation: &'static str,
    metrics: &CertificateMetrics,
    call: super::Answer<'_, T>,
) -> Result<T, SourceError> {
    let started = Instant::now();
    let silence = || SourceError::Unavailable(format!("it did not answer within {} s", CALL_LIMIT.as_secs()));
    let answer = tokio::time::timeout(CALL_LIMIT, call).await.unwrap_or_else(|_| Err(silence()));
    metrics.asked(operation, answer.as_ref().map_or_else(SourceError::reason, |_| "ok"), started.elapsed());
    answer
}

fn now() -> Now {
    Now { steady: Instant::now(), wall: OffsetDateTime::now_utc() }
}

#[cfg(test)]
mod tests;
