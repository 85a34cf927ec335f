//! One line for each finished connection. Keys follow ztunnel's, so that pipelines made for it read ours; bytes are
//! counted as in the metrics: *sent* is what the destination answered.

use super::connections::{Failure, OpenConnection, Protocol};
use super::live::Flow;
use std::time::Duration;

/// The target of these lines, for log filters: `access=off` silences them.
pub const TARGET: &str = "access";

/// A connection that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'a> {
    pub flow: &'a Flow,
    /// This daemon's node.
    pub node: &'a str,
    /// Bytes from the destination to the source.
    pub sent: u64,
    /// Bytes from the source to the destination.
    pub received: u64,
    /// Likewise in datagrams; left out of TCP's lines.
    pub datagrams_sent: u64,
    pub datagrams_received: u64,
    pub duration: Duration,
    pub failure: Option<Failure>,
    /// What went wrong, for people; shown with a failure only.
    pub detail: Option<&'a str>,
}

/// Writes the line of a connection that ends now.
pub fn finished(flow: &Flow, connection: &OpenConnection, node: &str) {
    let traffic = connection.traffic();
    write(&Finished {
        flow,
        node,
        sent: traffic.sent(),
        received: traffic.received(),
        datagrams_sent: traffic.datagrams_sent(),
        datagrams_received: traffic.datagrams_received(),
        duration: connection.elapsed(),
        failure: connection.failure(),
        detail: connection.failure_detail(),
    });
}

/// Writes the line: at level info, or warn if the connection failed.
pub fn write(finished: &Finished<'_>) {
    // The level of an event is fixed where it is written, hence the macro.
    macro_rules! line {
        ($level:ident, $message:literal) => {{
            let flow = finished.flow;
            let is_udp = flow.protocol == Protocol::Udp;
            // A refusal always says whose word it was, also if it was nobody's but the default.
            let no_policy = (flow.verdict == Some("deny")).then_some(super::policy::NONE);
            let (src_namespace, src_workload) = split(flow.source_workload.as_deref());
            let (dst_namespace, dst_workload) = split(flow.destination_workload.as_deref());
            tracing::$level!(
                target: "access",
                direction = flow.direction.as_str(),
                src.addr = display(flow.source),
                src.workload = src_workload,
                src.namespace = src_namespace,
                src.identity = flow.source_identity.as_deref(),
                dst.addr = display(flow.backend.unwrap_or(flow.destination)),
                dst.original_addr = display(flow.destination),
                dst.service = flow.service.as_deref(),
                dst.workload = dst_workload,
                dst.namespace = dst_namespace,
                dst.identity = flow.destination_identity.as_deref(),
                dst.node = flow.node.as_deref(),
                bytes_sent = finished.sent,
                bytes_recv = finished.received,
                datagrams_sent = is_udp.then_some(finished.datagrams_sent),
                datagrams_recv = is_udp.then_some(finished.datagrams_received),
                duration = display(format_args!("{}ms", finished.duration.as_millis())),
                response_flags = finished.failure.map(|failure| failure.flag.as_str()),
                reason = finished.failure.map(|failure| failure.reason),
                verdict = flow.verdict,
                policy = flow.policy.as_deref().or(no_policy),
                rule = flow.rule.as_deref().or(no_policy),
                error = finished.failure.and(finished.detail),
                protocol = flow.protocol.as_str(),
                transport = flow.transport,
                tls.kx = flow.group.as_deref(),
                tls.suite = flow.suite.as_deref(),
                node = finished.node,
                $message
            );
        }};
    }
    if finished.failure.is_some() {
        line!(warn, "connection failed");
    } else {
        line!(info, "connection complete");
    }
}

/// `namespace/name` in its parts.
fn split(workload: Option<&str>) -> (Option<&str>, Option<&str>) {
    match workload.map(|workload| workload.split_once('/')) {
        Some(Some((namespace, name))) => (Some(namespace), Some(name)),
        Some(None) => (None, workload),
        None => (None, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::connections::ResponseFlag;
    use crate::telemetry::live::Direction;
    use crate::telemetry::logging::{Format, captured};

    fn flow() -> Flow {
        Flow {
            source_workload: Some("shop/web-1".into()),
            source_identity: Some("spiffe://example.org/ns/shop/sa/web".into()),
            service: Some("shop/cart".into()),
            backend: Some(([10, 1, 2, 3], 8080).into()),
            destination_workload: Some("shop/cart-1".into()),
            destination_identity: Some("spiffe://example.org/ns/shop/sa/cart".into()),
            node: Some("n2".into()),
            transport: Some("lane"),
            group: Some("X25519MLKEM768".into()),
            suite: Some("TLS13_AES_256_GCM_SHA384".into()),
            verdict: Some("allow"),
            policy: Some("shop/let".into()),
            rule: Some("friends".into()),
            ..Flow::new(Direction::Outbound, ([10, 1, 1, 1], 40_000).into(), ([10, 96, 0, 1], 80).into())
        }
    }

    fn line(finished: &Finished<'_>) -> serde_json::Value {
        let text = captured("info", Format::Json, || write(finished));
        assert_eq!(text.lines().count(), 1, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_finished_connection_is_one_line_with_every_key() {
        let flow = flow();
        let duration = Duration::from_millis(12);
        let finished = Finished {
            flow: &flow,
            node: "n1",
            sent: 5,
            received: 7,
            datagrams_sent: 0,
            datagrams_received: 0,
            duration,
            failure: None,
            detail: Some("unused"),
        };
        let line = line(&finished);
        for (key, value) in [
            ("level", "INFO"),
            ("target", TARGET),
            ("message", "connection complete"),
            ("direction", "outbound"),
            ("src.addr", "10.1.1.1:40000"),
            ("src.workload", "web-1"),
            ("src.namespace", "shop"),
            ("src.identity", "spiffe://example.org/ns/shop/sa/web"),
            ("dst.addr", "10.1.2.3:8080"),
            ("dst.original_addr", "10.96.0.1:80"),
            ("dst.service", "shop/cart"),
            ("dst.workload", "cart-1"),
            ("dst.namespace", "shop"),
            ("dst.identity", "spiffe://example.org/ns/shop/sa/cart"),
            ("duration", "12ms"),
            ("verdict", "allow"),
            ("policy", "shop/let"),
            ("rule", "friends"),
            ("protocol", "tcp"),
            ("transport", "lane"),
            ("tls.kx", "X25519MLKEM768"),
            ("node", "n1"),
        ] {
            assert_eq!(line[key], value, "{key} in {line}");
        }
        assert_eq!((&line["bytes_sent"], &line["bytes_recv"]), (&5.into(), &7.into()));
        assert!(line.get("error").is_none() && line.get("reason").is_none(), "{line}");
        assert!(line.get("datagrams_sent").is_none() && line.get("datagrams_recv").is_none(), "{line}");
    }

    #[test]
    fn a_finished_flow_of_datagrams_counts_them() {
        let flow = Flow { protocol: Protocol::Udp, ..flow() };
        let finished = Finished {
            flow: &flow,
            node: "n1",
            sent: 500,
            received: 70,
            datagrams_sent: 2,
            datagrams_received: 1,
            duration: Duration::from_secs(5),
            failure: None,
            detail: None,
        };
        let line = line(&finished);
        assert_eq!((&line["protocol"], &line["dst.service"]), (&"udp".into(), &"shop/cart".into()));
        assert_eq!((&line["datagrams_sent"], &line["datagrams_recv"]), (&2.into(), &1.into()), "{line}");
        assert_eq!((&line["bytes_sent"], &line["bytes_recv"]), (&500.into(), &70.into()), "{line}");
    }

    #[test]
    fn a_failed_connection_says_why_and_leaves_out_what_is_unknown() {
        let addresses = (([10, 1, 1, 1], 40_000).into(), ([10, 1, 2, 3], 8080).into());
        let flow = Flow { verdict: Some("deny"), ..Flow::new(Direction::Inbound, addresses.0, addresses.1) };
        let failure = Some(Failure { flag: ResponseFlag::Connect, reason: "refused" });
        let detail = "connection refused by 10.1.2.3:8080";
        let finished = Finished {
            flow: &flow,
            node: "n1",
            sent: 0,
            received: 0,
            datagrams_sent: 0,
            datagrams_received: 0,
            duration: Duration::ZERO,
            failure,
            detail: Some(detail),
        };
        let line = line(&finished);
        assert_eq!((&line["level"], &line["reason"]), (&"WARN".into(), &"refused".into()));
        assert_eq!((&line["response_flags"], &line["error"]), (&"CONNECT".into(), &detail.into()));
        assert_eq!((&line["verdict"], &line["policy"], &line["rule"]), (&"deny".into(), &"-".into(), &"-".into()));
        assert!(line.get("dst.service").is_none() && line.get("src.identity").is_none(), "{line}");
    }
}
