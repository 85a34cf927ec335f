//! The daemon's log of finished connections, as a program reads it (`log: {format: json}`).

use serde::Deserialize;

/// One finished connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Access {
    /// `outbound` at the source's node, `inbound` at the destination's.
    pub direction: String,
    /// The client's address.
    #[serde(rename = "src.addr")]
    pub source: String,
    #[serde(rename = "src.workload")]
    pub source_workload: Option<String>,
    #[serde(rename = "src.identity")]
    pub source_identity: Option<String>,
    /// The endpoint's address, or the one asked for if none was chosen.
    #[serde(rename = "dst.addr")]
    pub backend: String,
    /// The address that the client asked for.
    #[serde(rename = "dst.original_addr")]
    pub destination: String,
    /// `namespace/name`.
    #[serde(rename = "dst.service")]
    pub service: Option<String>,
    #[serde(rename = "dst.workload")]
    pub destination_workload: Option<String>,
    #[serde(rename = "dst.identity")]
    pub destination_identity: Option<String>,
    /// The other node.
    #[serde(rename = "dst.node")]
    pub destination_node: Option<String>,
    /// From the destination to the source.
    pub bytes_sent: u64,
    /// From the source to the destination.
    pub bytes_recv: u64,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// From the destination to the source; UDP's lines alone.
    pub datagrams_sent: Option<u64>,
    /// From the source to the destination; UDP's lines alone.
    pub datagrams_recv: Option<u64>,
    /// What policy said: `allow` or `deny`.
    pub verdict: Option<String>,
    /// `namespace/name`.
    pub policy: Option<String>,
    pub rule: Option<String>,
    pub response_flags: Option<String>,
    pub reason: Option<String>,
    pub error: Option<String>,
    pub transport: Option<String>,
    #[serde(rename = "tls.kx")]
    pub group: Option<String>,
    #[serde(rename = "tls.suite")]
    pub suite: Option<String>,
    /// The daemon's own node.
    pub node: String,
}

impl Access {
    /// Whether it failed, in any way.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.response_flags.is_some() || self.reason.is_some()
    }
}

/// The lines of a log that are about finished connections.
#[must_use]
pub fn parse(log: &str) -> Vec<Access> {
    let line = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        (value["target"] == "access").then(|| serde_json::from_value(value).ok()).flatten()
    };
    log.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_connections_are_told_from_the_rest() {
        let log = concat!(
            "plain text\n",
            r#"{"level":"INFO","target":"mesh_userspace::app","message":"ready"}"#,
            "\n",
            r#"{"level":"INFO","target":"access","message":"connection complete","direction":"outbound","src.addr":"10.1.1.1:4","#,
            r#""dst.addr":"10.1.2.3:80","dst.original_addr":"10.96.0.1:80","bytes_sent":5,"bytes_recv":7,"transport":"lane","#,
            r#""tls.kx":"X25519MLKEM768","node":"n1"}"#,
            "\n",
            r#"{"level":"WARN","target":"access","direction":"outbound","response_flags":"CONNECT","reason":"refused"}"#,
            "\n",
        );
        let lines = parse(log);
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].bytes_sent, lines[0].bytes_recv, lines[0].failed()), (5, 7, false));
        assert_eq!((lines[0].transport.as_deref(), lines[0].group.as_deref()), (Some("lane"), Some("X25519MLKEM768")));
        assert!(lines[1].failed());
    }
}
