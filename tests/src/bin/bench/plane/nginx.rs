//! nginx's stream module at both ends, two workers each.

use super::{Links, Pair, Plane, write};
use crate::pki::{Leaf, NAME};
use anyhow::Result;
use mesh_tests::program::{Program, Running};
use std::fmt::Write as _;
use std::path::Path;

pub(crate) fn start(pair: &Pair<'_>) -> Result<(Plane, Vec<Running>)> {
    let (client, server) = (pair.client_links(), pair.server_links());
    let mut running = Vec::new();
    for (pod, links, text) in [
        ("server", &server, text(&server, &served(pair, &pair.pki.server), pair, "server")?),
        ("client", &client, text(&client, &proxied(pair, &pair.pki.client), pair, "client")?),
    ] {
        let path = write(&pair.folder()?, &format!("{pod}.conf"), &text)?;
        running.push(pair.start(pod, Program::new("nginx").args(["-e", "stderr", "-c"]).args([&path]), links)?);
    }
    Ok((pair.plane()?, running))
}

/// What a server block says to take TLS.
fn served(pair: &Pair<'_>, leaf: &Leaf) -> String {
    format!(
        "ssl_certificate {}; ssl_certificate_key {}; ssl_client_certificate {}; ssl_verify_client on; ssl_protocols \
         TLSv1.3;",
        leaf.certificate.display(),
        leaf.key.display(),
        pair.pki.bundle.display()
    )
}

/// What a server block says to speak TLS with the next one.
fn proxied(pair: &Pair<'_>, leaf: &Leaf) -> String {
    format!(
        "proxy_ssl on; proxy_ssl_certificate {}; proxy_ssl_certificate_key {}; proxy_ssl_trusted_certificate {}; \
         proxy_ssl_verify on; proxy_ssl_name {NAME}; proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse on;",
        leaf.certificate.display(),
        leaf.key.display(),
        pair.pki.bundle.display()
    )
}

fn text(links: &Links, tls: &str, pair: &Pair<'_>, pod: &str) -> Result<String> {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let load = if Path::new(MODULE).exists() { format!("load_module {MODULE};\n") } else { String::new() };
    let ssl = if pod == "server" { " ssl" } else { "" };
    let mut text = format!(
        "{load}daemon off;\nworker_processes 2;\nworker_rlimit_nofile 20000;\npid {}/{pod}.pid;\nerror_log \
         stderr;\nevents {{ worker_connections 19900; }}\nstream {{\n",
        pair.folder()?.display()
    );
    for (listens, leads) in links {
        writeln!(
            text,
            "  server {{ listen {listens}{ssl} backlog=4096; proxy_pass {leads}; proxy_timeout 1h; tcp_nodelay on; {tls} }}"
        )?;
    }
    text.push_str("}\n");
    Ok(text)
}
