//! The verbs about the certificate authority: tokens, nodes, joining, rotation.

use super::fetch::Daemon;
use super::show::{Show, View, expiry};
use super::table::{
    Align::{Left, Right},
    Table,
};
use super::{Done, Exit, Output, Problem, Session};
use crate::admin::ca_documents::{CaRow, NodeRow, RotateRequest, TokenRequest, TokenRow};
use crate::admin::documents::{Document, Item, timestamp};
use crate::ca::{self, JoinError, Token};
use crate::model::NodeName;
use clap::{Args, Subcommand, ValueEnum};
use hyper::Method;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(super) enum NodeVerb {
    /// Tokens with which nodes join; ask where the certificate authority runs
    #[command(subcommand)]
    Token(TokenVerb),
    /// List the nodes that have joined
    List,
    /// Shut a node out: it gets no certificates any more, and what it has ends by itself
    Revoke {
        /// The node's name
        #[arg(value_parser = node_name)]
        name: NodeName,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenVerb {
    /// Make a token that lets one node join, once, and print the line to run there
    Create {
        /// How long it may be used: a whole number and s, m or h; 24h at most
        #[arg(long, default_value = "1h", value_parser = ttl)]
        ttl: Duration,
        /// The only node that may use it; needed for a name that has joined before
        #[arg(long, value_name = "NAME", value_parser = node_name)]
        node: Option<NodeName>,
    },
    /// List the tokens on record; a token itself is shown only when it is made
    List,
    /// Take a token back that has not been used
    Revoke {
        /// The token's id: the part between its second and third dot
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum CaVerb {
    /// Show the authority's certificates, and how far a rotation is
    Status,
    /// Change the certificates that sign, while traffic runs
    Rotate {
        #[arg(value_enum)]
        what: What,
        /// Take the next step without waiting for nodes to follow: those that have not may fail
        #[arg(long)]
        now: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum What {
    /// In three steps: announced to every node, signing, the old one gone
    Root,
    /// At once
    Intermediate,
}

#[derive(Debug, Args)]
pub(super) struct JoinArguments {
    /// The certificate authority, HOST:PORT
    #[arg(long = "ca", value_name = "ADDRESS")]
    address: String,
    /// What `nodemesh node token create` printed; @FILE reads it from a file, which keeps it out of the process list
    #[arg(long)]
    token: String,
    /// This node's name, as the catalog and nodemeshd.yaml write it
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    node: NodeName,
    /// Where the node's certificate and the mesh's roots go: `identity.directory` of nodemeshd.yaml
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nodemesh/identity")]
    directory: PathBuf,
}

fn node_name(text: &str) -> Result<NodeName, String> {
    NodeName::parse(text).map_err(|error| error.to_string())
}

fn ttl(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration: write a whole number and s, m or h, e.g. 30m");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let total = Duration::from_secs(number.checked_mul(seconds).ok_or_else(wrong)?);
    if total.is_zero() || total > ca::MAX_TOKEN_TTL {
        return Err(format!("from 1s to {}h", ca::MAX_TOKEN_TTL.as_secs() / 3600));
    }
    Ok(total)
}

impl<W: Write> Session<'_, W> {
    pub(super) fn node(&mut self, verb: &NodeVerb) -> Result<Done, Problem> {
        match verb {
            NodeVerb::Token(TokenVerb::Create { ttl, node }) => self.create_token(*ttl, node.as_ref()),
            NodeVerb::Token(TokenVerb::List) => self.get::<TokenRow>("/v1/tokens"),
            NodeVerb::Token(TokenVerb::Revoke { id }) => {
                let revoked: Document<TokenRow> =
                    self.send(Method::DELETE, &format!("/v1/tokens/{}", path_part(id)?), &())?;
                self.show(&revoked)
            }
            NodeVerb::List => self.get::<NodeRow>("/v1/nodes"),
            NodeVerb::Revoke { name } => {
                let revoked: Document<NodeRow> = self.send(Method::POST, &format!("/v1/nodes/{name}/revoke"), &())?;
                self.show(&revoked)
            }
        }
    }

    pub(super) fn authority(&mut self, verb: &CaVerb) -> Result<Done, Problem> {
        match verb {
            CaVerb::Status => self.get::<CaRow>("/v1/ca"),
            CaVerb::Rotate { what, now } => {
                let what = match what {
                    What::Root => "root",
                    What::Intermediate => "intermediate",
                };
                let request = RotateRequest { what: what.to_owned(), now: *now };
                let answer: Document<CaRow> = self.send(Method::POST, "/v1/ca/rotate", &request)?;
                self.show(&answer)
            }
        }
    }

    fn create_token(&mut self, ttl: Duration, node: Option<&NodeName>) -> Result<Done, Problem> {
        let request = TokenRequest { ttl_seconds: Some(ttl.as_secs()), node: node.map(ToString::to_string) };
        let made: Document<TokenRow> = self.send(Method::POST, "/v1/tokens", &request)?;
        if self.options.output == Output::Json {
            return self.show(&made);
        }
        for row in &made.items {
            let token = row.token.as_deref().unwrap_or_default();
            // An authority that listens everywhere does not know by which address nodes reach it.
            let known =
                row.addresses.iter().find(|address| !address.starts_with("0.0.0.0:") && !address.starts_with("[::]:"));
            let address = known.map_or_else(|| format!("ADDRESS:{}", ca::DEFAULT_PORT), Clone::clone);
            let name = row.node.as_deref().unwrap_or("NAME");
            writeln!(self.out, "nodemesh join --ca {address} --token {token} --node {name}")?;
        }
        let expires = made.items.first().map(|row| expiry(&row.expires, self.now)).unwrap_or_default();
        let note = format!("run this line on the node that is to join; it works once, until {expires}");
        Ok(Done { exit: Exit::Ok, note: Some(note) })
    }

    pub(super) fn join(&mut self, arguments: &JoinArguments) -> Result<Done, Problem> {
        let text = match arguments.token.strip_prefix('@') {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|error| Problem::Input(format!("cannot read the token from {path}: {error}")))?,
            None => arguments.token.clone(),
        };
        let token: Token = text.trim().parse().map_err(|error: ca::InvalidToken| Problem::Input(error.to_string()))?;
        let timeout = Duration::from_secs(self.options.timeout);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Problem::Output)?;
        let joining = ca::join(&arguments.address, &token, &arguments.node, &arguments.directory, timeout);
        let membership = runtime.block_on(joining).map_err(Problem::from)?;
        self.show(&Document::new(vec![MembershipRow {
            id: membership.id.to_string(),
            certificate: membership.certificate.display().to_string(),
            not_after: timestamp(membership.not_after.into()),
        }]))
    }

    fn send<T: Item + serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Document<T>, Problem> {
        let body = serde_json::to_vec(body).map_err(std::io::Error::from)?;
        let daemon = Daemon::new(&self.options.socket, Duration::from_secs(self.options.timeout));
        Ok(daemon.send(method, path, body)?)
    }

    fn show<T: Show + Serialize>(&mut self, document: &Document<T>) -> Result<Done, Problem> {
        self.print(document)?;
        Ok(Exit::Ok.into())
    }
}

/// What the user typed becomes part of a path.
fn path_part(text: &str) -> Result<&str, Problem> {
    let sound = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
    sound
        .then_some(text)
        .ok_or_else(|| Problem::Input(format!("{text:?} is no token id: `nodemesh node token list` shows them")))
}

impl From<JoinError> for Problem {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Unavailable { message } => Self::Authority(message),
            error => Self::Input(error.to_string()),
        }
    }
}

/// What joining has brought.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MembershipRow {
    id: String,
    /// The file with the node's certificate.
    certificate: String,
    not_after: String,
}

impl Item for MembershipRow {
    const KIND: &'static str = "MembershipList";

    fn order(&self, other: &Self) -> Ordering {
        self.id.cmp(&other.id)
    }
}

impl Show for MembershipRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[("NODE", Left), ("CERTIFICATE", Left), ("EXPIRES", Left)]);
        for row in items {
            table.row([row.id.clone(), row.certificate.clone(), expiry(&row.not_after, view.now)]);
        }
        table.render(view.headers)
    }
}

impl Show for TokenRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[
            ("ID", Left),
            ("STATE", Left),
            ("NODE", Left),
            ("USED-BY", Left),
            ("CREATED", Left),
            ("EXPIRES", Left),
        ]);
        for row in items {
            let known = |text: &Option<String>| text.clone().unwrap_or_default();
            let ends = if row.state == "open" { expiry(&row.expires, view.now) } else { row.expires.clone() };
            let cells = [row.id.clone(), row.state.clone(), known(&row.node), known(&row.used_by), row.created.clone()];
            table.row(cells.into_iter().chain([ends]));
        }
        table.render(view.headers)
    }
}

impl Show for NodeRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[
            ("NAME", Left),
            ("STATE", Left),
            ("JOINED", Left),
            ("LAST-SEEN", Left),
            ("BUNDLE", Right),
            ("CERTIFICATE-EXPIRES", Left),
        ]);
        for row in items {
            let cells = [row.name.clone(), row.state.clone(), row.joined.clone(), row.last_seen.clone()];
            let more = [row.bundle_version.to_string(), expiry(&row.not_after, view.now)];
            table.row(cells.into_iter().chain(more));
        }
        table.render(view.headers)
    }
}

impl Show for CaRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut text = String::new();
        for row in items {
            let mut facts = Table::new(&[("", Left), ("", Left)]);
            for (name, value) in [
                ("Trust domain", row.trust_domain.clone()),
                ("Bundle", format!("version {}, epoch {}", row.bundle_version, row.epoch)),
                ("Nodes", format!("{} joined", row.nodes)),
                ("Tokens", format!("{} open", row.open_tokens)),
                ("Rotation", rotation(row, view)),
            ] {
                facts.row([format!("{name}:"), value]);
            }
            text.push_str(&facts.render(false));
            let mut issuers = Table::new(&[("ISSUER", Left), ("SERIAL", Left), ("SIGNS", Left), ("EXPIRES", Left)]);
            for issuer in &row.issuers {
                let signs = if issuer.active { "yes" } else { "no" }.to_owned();
                issuers.row([issuer.kind.clone(), issuer.serial.clone(), signs, expiry(&issuer.not_after, view.now)]);
            }
            text.push('\n');
            text.push_str(&issuers.render(view.headers));
        }
        text
    }
}

fn rotation(row: &CaRow, view: &View) -> String {
    let until = row.rotation.until.as_deref().map(|until| expiry(until, view.now)).unwrap_or_default();
    match row.rotation.phase.as_str() {
        "steady" => "none".to_owned(),
        "announced" if row.rotation.waits_for.is_empty() => {
            "the new root is announced, and signs in a moment".to_owned()
        }
        "announced" => {
            format!(
                "the new root is announced; it signs once these use it, or at {until}: {}",
                row.rotation.waits_for.join(", ")
            )
        }
        "retiring" => format!("the new root signs; the old one leaves the bundle at {until}"),
        other => other.to_owned(),
    }
}
