//! What the tunnel counts: lanes, handshakes, streams and bytes between nodes.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Metrics of the tunnel. Labels are looked up when a lane opens or closes, never per packet.
#[derive(Clone, Debug, Default)]
pub struct TunnelMetrics {
    lanes: Family<Labels<3>, Gauge>,
    opened: Family<Labels<3>, Counter>,
    closed: Family<Labels<3>, Counter>,
    handshake_failures: Family<Labels<3>, Counter>,
    streams_opened: Family<Labels<2>, Counter>,
    streams_refused: Family<Labels<3>, Counter>,
    streams_moved: Family<Labels<2>, Counter>,
    rehandshakes: Family<Labels<2>, Counter>,
    sent: Family<Labels<2>, Counter>,
    received: Family<Labels<2>, Counter>,
    malformed_headers: Family<Labels<2>, Counter>,
}

/// Counters of application bytes that one lane adds to.
#[derive(Clone, Debug)]
pub struct TunnelBytes {
    pub sent: Counter,
    pub received: Counter,
}

/// Counts a lane as open until dropped.
#[derive(Debug)]
pub struct LaneGauge {
    gauge: Gauge,
}

impl Drop for LaneGauge {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

impl TunnelMetrics {
    /// Registers the tunnel's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("tunnel");
        registry.register("lanes", "Open connections between nodes", metrics.lanes.clone());
        registry.register("lanes_opened", "Connections between nodes that were established", metrics.opened.clone());
        registry.register("lanes_closed", "Connections between nodes that ended, by reason", metrics.closed.clone());
        registry.register(
            "handshake_failures",
            "Connections between nodes that failed before they were established, by reason",
            metrics.handshake_failures.clone(),
        );
        registry.register("streams_opened", "Application connections carried", metrics.streams_opened.clone());
        registry.register(
            "streams_refused",
            "Application connections that the destination's node refused, by reason",
            metrics.streams_refused.clone(),
        );
        registry.register(
            "streams_moved",
            "Application connections that were moved to another lane, by reason",
            metrics.streams_moved.clone(),
        );
        registry.register(
            "rehandshakes",
            "Connections between nodes dialled because the certificates of an older one come to their end, by result",
            metrics.rehandshakes.clone(),
        );
        registry.register_with_unit("sent", "Bytes sent inside TLS", Unit::Bytes, metrics.sent.clone());
        registry.register_with_unit("received", "Bytes received inside TLS", Unit::Bytes, metrics.received.clone());
        registry.register(
            "malformed_headers",
            "Streams or lanes refused because their opening was malformed, oversized or late, by reason",
            metrics.malformed_headers.clone(),
        );
        metrics
    }

    /// A lane was established. `direction`: `outbound` where this node dialled.
    #[must_use]
    pub fn lane_opened(&self, transport: &'static str, kind: &'static str, direction: &'static str) -> LaneGauge {
        self.opened.get_or_create(&lane(transport, kind, direction)).inc();
        self.lane_is(transport, kind, direction)
    }

    /// Counts an open lane under another kind: drop the former gauge.
    #[must_use]
    pub fn lane_is(&self, transport: &'static str, kind: &'static str, direction: &'static str) -> LaneGauge {
        let gauge = self.lanes.get_or_create_owned(&lane(transport, kind, direction));
        gauge.inc();
        LaneGauge { gauge }
    }

    pub fn lane_closed(&self, transport: &'static str, direction: &'static str, reason: &'static str) {
        self.closed.get_or_create(&[("transport", transport), ("direction", direction), ("reason", reason)]).inc();
    }

    /// `side`: `client` where this node dialled, else `server`.
    pub fn handshake_failed(&self, transport: &'static str, side: &'static str, reason: &'static str) {
        self.handshake_failures.get_or_create(&[("transport", transport), ("side", side), ("reason", reason)]).inc();
    }

    pub fn stream_opened(&self, transport: &'static str, direction: &'static str) {
        self.streams_opened.get_or_create(&[("transport", transport), ("direction", direction)]).inc();
    }

    pub fn stream_refused(&self, transport: &'static str, direction: &'static str, reason: &'static str) {
        self.streams_refused
            .get_or_create(&[("transport", transport), ("direction", direction), ("reason", reason)])
            .inc();
    }

    /// `reason`: `bulk` (to a lane of its own) or `renewal` (to one with fresher certificates).
    pub fn stream_moved(&self, direction: &'static str, reason: &'static str) {
        self.streams_moved.get_or_create(&[("direction", direction), ("reason", reason)]).inc();
    }

    /// `result`: `renewed`, `unchanged` (the peer has no newer certificate) or `failed`.
    pub fn rehandshaked(&self, transport: &'static str, result: &'static str) {
        self.rehandshakes.get_or_create(&[("transport", transport), ("result", result)]).inc();
    }

    pub fn malformed_header(&self, transport: &'static str, reason: &'static str) {
        self.malformed_headers.get_or_create(&[("transport", transport), ("reason", reason)]).inc();
    }

    /// The byte counters for one lane to keep.
    #[must_use]
    pub fn bytes(&self, transport: &'static str, direction: &'static str) -> TunnelBytes {
        let labels = [("transport", transport), ("direction", direction)];
        TunnelBytes {
            sent: self.sent.get_or_create_owned(&labels),
            received: self.received.get_or_create_owned(&labels),
        }
    }
}

fn lane(transport: &'static str, kind: &'static str, direction: &'static str) -> Labels<3> {
    [("transport", transport), ("kind", kind), ("direction", direction)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_exported_with_their_units() {
        let mut registry = Registry::with_prefix("nodemesh");
        let metrics = TunnelMetrics::register(&mut registry);
        let gauge = metrics.lane_opened("lanes", "shared", "outbound");
        metrics.bytes("lanes", "outbound").sent.inc_by(7);
        let text = |registry: &Registry| {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
            text
        };
        let labels = r#"transport="lanes",kind="shared",direction="outbound""#;
        assert!(text(&registry).contains(&format!("nodemesh_tunnel_lanes{{{labels}}} 1")), "{}", text(&registry));
        assert!(
            text(&registry).contains(r#"nodemesh_tunnel_sent_bytes_total{transport="lanes",direction="outbound"} 7"#)
        );
        drop(gauge);
        assert!(text(&registry).contains(&format!("nodemesh_tunnel_lanes{{{labels}}} 0")));
    }
}
