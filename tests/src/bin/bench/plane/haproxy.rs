//! HAProxy at both ends, two threads each.

use super::{Links, Pair, Plane, write};
use crate::pki::Leaf;
use anyhow::Result;
use mesh_tests::program::{Program, Running};
use std::fmt::Write as _;

pub(crate) fn start(pair: &Pair<'_>) -> Result<(Plane, Vec<Running>)> {
    let client = (pair.client_links(), &pair.pki.client, Side::Client);
    let server = (pair.server_links(), &pair.pki.server, Side::Server);
    let mut running = Vec::new();
    for (pod, (links, leaf, side)) in [("server", server), ("client", client)] {
        let path = write(&pair.folder()?, &format!("{pod}.cfg"), &text(pair, &links, leaf, side)?)?;
        running.push(pair.start(pod, Program::new("haproxy").args(["-db", "-f"]).args([&path]), &links)?);
    }
    Ok((pair.plane()?, running))
}

#[derive(Clone, Copy)]
enum Side {
    Client,
    Server,
}

fn text(pair: &Pair<'_>, links: &Links, leaf: &Leaf, side: Side) -> Result<String> {
    let bundle = pair.pki.bundle.display();
    let tls = format!("ssl crt {} ca-file {bundle} verify required ssl-min-ver TLSv1.3", leaf.both.display());
    let (bind, server) = match side {
        Side::Client => ("", tls.as_str()),
        Side::Server => (tls.as_str(), ""),
    };
    let mut text =
        "global\n  nbthread 2\n  maxconn 9500\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client \
                    1h\n  timeout server 1h\n"
            .to_owned();
    for (number, (listens, leads)) in links.iter().enumerate() {
        write!(text, "listen link{number}\n  bind {listens} {bind}\n  server next {leads} {server}\n")?;
    }
    Ok(text)
}
