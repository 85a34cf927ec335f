//! Envoy at both ends, two workers each.

use super::{Links, Pair, Plane, write};
use crate::pki::Leaf;
use anyhow::{Context, Result};
use mesh_tests::program::{Program, Running};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;

const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";
const TCP_PROXY: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
/// Envoy's own limit of connections to a cluster is 1,024.
const CONNECTIONS: u32 = 100_000;

pub(crate) fn start(pair: &Pair<'_>, program: &Path) -> Result<(Plane, Vec<Running>)> {
    let pki = pair.pki;
    let spoken = secured(pair, &pki.client, &pki.server.id, "UpstreamTlsContext");
    let mut taken = secured(pair, &pki.server, &pki.client.id, "DownstreamTlsContext");
    taken["typed_config"]["require_client_certificate"] = true.into();
    let mut running = Vec::new();
    for (pod, links, listener, cluster) in
        [("server", pair.server_links(), Some(&taken), None), ("client", pair.client_links(), None, Some(&spoken))]
    {
        let text =
            serde_json::to_string(&config(&links, listener, cluster)).context("a configuration is plain data")?;
        let path = write(&pair.folder()?, &format!("{pod}.json"), &text)?;
        let program = Program::new(program)
            .args(["--concurrency", "2", "--disable-hot-restart", "--log-level", "error", "-c"])
            .args([&path]);
        running.push(pair.start(pod, program, &links)?);
    }
    Ok((pair.plane()?, running))
}

fn secured(pair: &Pair<'_>, own: &Leaf, peer: &str, context: &str) -> Value {
    let certificates = json!([{
        "certificate_chain": {"filename": own.certificate}, "private_key": {"filename": own.key},
    }]);
    json!({"name": "tls", "typed_config": {"@type": format!("{TLS}.{context}"), "common_tls_context": {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": certificates,
        "validation_context": {
            "trusted_ca": {"filename": pair.pki.bundle},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    }}})
}

fn config(links: &Links, taken: Option<&Value>, spoken: Option<&Value>) -> Value {
    let numbered = || links.iter().enumerate();
    let listeners: Vec<_> = numbered().map(|(number, (listens, _))| listener(number, *listens, taken)).collect();
    let clusters: Vec<_> = numbered().map(|(number, (_, leads))| cluster(number, *leads, spoken)).collect();
    json!({"static_resources": {"listeners": listeners, "clusters": clusters}})
}

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip(), "port_value": address.port()}})
}

fn listener(number: usize, address: SocketAddr, tls: Option<&Value>) -> Value {
    let name = format!("link{number}");
    let proxy = json!({"name": "proxy", "typed_config": {"@type": TCP_PROXY, "stat_prefix": name, "cluster": name}});
    let mut chain = json!({"filters": [proxy]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls.clone();
    }
    json!({"name": name, "address": socket(address), "filter_chains": [chain]})
}

fn cluster(number: usize, address: SocketAddr, tls: Option<&Value>) -> Value {
    let name = format!("link{number}");
    let endpoint = json!({"endpoint": {"address": socket(address)}});
    let limit = json!({
        "max_connections": CONNECTIONS, "max_pending_requests": CONNECTIONS, "max_requests": CONNECTIONS,
    });
    let mut cluster = json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s", "circuit_breakers": {"thresholds": [limit]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls.clone();
    }
    cluster
}
