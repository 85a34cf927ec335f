//! Live streams change lanes: bulk to lanes of its own, and all of them off lanes whose certificates come to their end.
//!
//! A renewed stream joins a shared lane, whatever it was on before; if it is (still) bulk it soon gets a lane of its own
//! again. Tried at [`Lifetime::renew`](crate::tunnel::lifetime::Lifetime) and from then on until the lane is empty or
//! its end has come.

use super::{Entry, Pool};
use crate::tunnel::ResetCode;
use crate::tunnel::lane::{EXCLUSIVE, LANES, Lane, SHARED};
use crate::tunnel::route::{Leg, Moving, Route};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

/// Streams of one lane that are asked for and not answered at a time.
const MOVES_AT_ONCE: usize = 16;
/// Between two rounds while streams are moving.
const NEXT_ROUND: Duration = Duration::from_millis(20);

/// Why a stream moved, in words of the metrics.
pub(in crate::tunnel) const BULK: &str = "bulk";
pub(in crate::tunnel) const RENEWAL: &str = "renewal";

impl Pool {
    /// Gives a bulk stream a lane of its own; it stays where it is if that fails.
    pub(super) async fn move_to_own_lane(self: Arc<Self>, entry: Arc<Entry>, route: Arc<Route>) {
        let Some(moving) = route.begin_move(true) else { return };
        if let Some(leg) = self.own_lane(&entry, &moving).await {
            self.finish_move(moving, leg, BULK).await;
        }
    }

    /// Sends ATTACH on a lane that carries nothing, dialling one if need be.
    async fn own_lane(self: &Arc<Self>, entry: &Arc<Entry>, moving: &Moving) -> Option<Leg> {
        let from = &moving.from;
        let attach = |lane: &Arc<Lane>| {
            let id = lane.attach(from.lane.facts.token, from.id).ok()?;
            Some(Leg { lane: Arc::clone(lane), id })
        };
        {
            let mut lanes = entry.lock();
            if let Some(leg) = lanes.exclusive.iter().find_map(attach) {
                return Some(leg);
            }
            if lanes.exclusive.len() + lanes.coming >= self.share(self.config.max_exclusive_lanes) {
                return None;
            }
            lanes.coming += 1;
        }
        let dialled = self.dial(entry, EXCLUSIVE).await;
        entry.lock().coming -= 1;
        let lane = dialled.inspect_err(|error| tracing::debug!(%error, "no exclusive lane")).ok()?;
        // The stream may have ended meanwhile, or another one may have been quicker.
        if moving.route.is_on(&from.lane) { attach(&lane) } else { None }
    }

    /// Waits for the answer and goes on there. There is no limit but the lane's end: a server that has answered has
    /// moved, so giving up on it would cost the stream.
    async fn finish_move(&self, moving: Moving, leg: Leg, reason: &'static str) -> bool {
        if leg.lane.answered(leg.id).await.is_err() {
            return false;
        }
        let is_moved = moving.route.attach(leg.clone(), reason == BULK, |_| {});
        if is_moved {
            self.metrics.stream_moved("outbound", reason);
        } else {
            leg.lane.with(|machine| machine.abandon(leg.id, ResetCode::CANCELLED));
        }
        is_moved
    }

    /// Waits until the lane is to be renewed, and then moves its streams away, a few at a time. Boxed: it dials lanes,
    /// which are to be renewed.
    pub(super) fn renewal(
        self: Arc<Self>,
        entry: Arc<Entry>,
        lane: Arc<Lane>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.renew(entry, lane))
    }

    async fn renew(self: Arc<Self>, entry: Arc<Entry>, lane: Arc<Lane>) {
        let lifetime = lane.facts.lifetime;
        sleep_until(lifetime.renew).await;
        lane.go_away();
        while Instant::now() < lifetime.end {
            let routes: Vec<_> = lane.routes().into_iter().filter(|route| route.is_on(&lane)).collect();
            let is_progress = !routes.is_empty()
                && self.fresh_lane(&entry, &lane).await.is_some()
                && self.move_all(&entry, &lane, routes).await;
            sleep(if is_progress { NEXT_ROUND } else { lifetime.retry(Instant::now()) }).await;
        }
    }

    /// Whether any of them moved.
    async fn move_all(self: &Arc<Self>, entry: &Arc<Entry>, lane: &Arc<Lane>, routes: Vec<Arc<Route>>) -> bool {
        let mut moves = JoinSet::new();
        let mut is_any_moved = false;
        for route in routes {
            if moves.len() >= MOVES_AT_ONCE {
                is_any_moved |= matches!(moves.join_next().await, Some(Ok(true)));
            }
            let (pool, entry, lane) = (Arc::clone(self), Arc::clone(entry), Arc::clone(lane));
            moves.spawn(async move { pool.renew_stream(&entry, &lane, &route).await });
        }
        while let Some(moved) = moves.join_next().await {
            is_any_moved |= matches!(moved, Ok(true));
        }
        is_any_moved
    }

    async fn renew_stream(self: &Arc<Self>, entry: &Arc<Entry>, old: &Arc<Lane>, route: &Arc<Route>) -> bool {
        let Some(moving) = route.begin_move(false) else { return false };
        let Some(lane) = self.fresh_lane(entry, old).await else { return false };
        // Others may have filled it meanwhile; the next round finds another.
        let Ok(id) = lane.join(moving.from.lane.facts.token, moving.from.id) else { return false };
        self.finish_move(moving, Leg { lane, id }, RENEWAL).await
    }

    /// A shared lane with room whose certificates end later than those of `old`, dialling one if there is none.
    async fn fresh_lane(self: &Arc<Self>, entry: &Arc<Entry>, old: &Lane) -> Option<Arc<Lane>> {
        let not_after = old.facts.lifetime.not_after;
        let is_fresh = |lane: &Arc<Lane>| {
            let (streams, takes_streams) = lane.load();
            takes_streams && streams < self.config.max_streams && lane.facts.lifetime.not_after > not_after
        };
        let known = || entry.lock().shared.iter().find(|lane| is_fresh(lane)).cloned();
        if let Some(lane) = known() {
            return Some(lane);
        }
        let _dialling = entry.dialling.lock().await;
        if let Some(lane) = known() {
            return Some(lane);
        }
        // While this side's own certificate is what ends and there is no newer one, dialling is no use.
        if self.identities.expiry_of(&entry.peer.source).is_none_or(|own| own <= not_after)
            || entry.lock().shared.len() >= self.share(self.config.max_shared_lanes)
        {
            return None;
        }
        let (lane, result) = match self.dial(entry, SHARED).await {
            Ok(lane) if is_fresh(&lane) => (Some(lane), "renewed"),
            Ok(lane) => {
                // The peer has no newer certificate. Unless someone has opened a stream on it, the lane is of no use.
                if lane.load().0 == 0 {
                    lane.go_away();
                }
                (None, "unchanged")
            }
            Err(error) => {
                tracing::debug!(%error, peer = %entry.peer.destination, "cannot renew a lane");
                (None, "failed")
            }
        };
        self.metrics.rehandshaked(LANES, result);
        lane
    }
}
