//! `nodemesh cert`: certificates and roots of this node.

use super::show::{Show, View, expiry};
use super::table::{Align::Left, Align::Right, Table, printable};
use super::{Daemon, Done, Exit, Output, Problem, Session};
use crate::admin::documents::{CertificateRow, RootRow, RotationRow};
use crate::model::SpiffeId;
use clap::{Args, Subcommand};
use std::io::Write;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List certificates: when they end, when they are renewed, what went wrong
    #[command(visible_alias = "ls")]
    List,
    /// Show one certificate and its chain
    Show {
        /// The SPIFFE ID
        id: String,
    },
    /// Renew certificates now
    Rotate(Which),
    /// Show the roots that this node trusts
    Bundle {
        /// Print them as PEM and nothing else
        #[arg(long)]
        pem: bool,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Which {
    /// The SPIFFE ID
    id: Option<String>,
    /// Every identity of this node
    #[arg(long)]
    all: bool,
}

impl<W: Write> Session<'_, W> {
    pub(super) fn cert(&mut self, verb: &Verb) -> Result<Done, Problem> {
        match verb {
            Verb::List => self.get::<CertificateRow>("/v1/certificates"),
            Verb::Show { id } => self.show_certificate(&checked(id)?),
            Verb::Rotate(Which { id, all: _ }) => self.rotate(id.as_deref()),
            Verb::Bundle { pem: false } => self.get::<RootRow>("/v1/bundle"),
            Verb::Bundle { pem: true } => self.print_bundle(),
        }
    }

    fn show_certificate(&mut self, id: &SpiffeId) -> Result<Done, Problem> {
        let document = self.fetch::<CertificateRow>(&format!("/v1/certificates?id={id}"))?;
        if self.options.output == Output::Json {
            self.print(&document)?;
        } else {
            for row in &document.items {
                self.out.write_all(facts(row, self.now).as_bytes())?;
            }
        }
        Ok(Exit::Ok.into())
    }

    fn rotate(&mut self, id: Option<&str>) -> Result<Done, Problem> {
        let path = match id {
            Some(id) => format!("/v1/certificates/rotate?id={}", checked(id)?),
            None => "/v1/certificates/rotate".to_owned(),
        };
        let daemon = Daemon::new(&self.options.socket, Duration::from_secs(self.options.timeout));
        let document = daemon.post::<RotationRow>(&path)?;
        self.print(&document)?;
        let note = "asked for: `nodemesh cert list` shows what came of it".to_owned();
        Ok(Done { exit: Exit::Ok, note: Some(note) })
    }

    fn print_bundle(&mut self) -> Result<Done, Problem> {
        let document = self.fetch::<RootRow>("/v1/bundle")?;
        if self.options.output == Output::Json {
            self.print(&document)?;
        } else {
            for root in &document.items {
                self.out.write_all(root.pem.as_bytes())?;
            }
        }
        Ok(Exit::Ok.into())
    }
}

/// Only what is a SPIFFE ID goes into a request.
fn checked(id: &str) -> Result<SpiffeId, Problem> {
    SpiffeId::parse(id).map_err(|error| Problem::Input(error.to_string()))
}

fn facts(row: &CertificateRow, now: std::time::SystemTime) -> String {
    let mut table = Table::new(&[("", Left), ("", Left)]);
    let known = |text: &Option<String>| text.clone().unwrap_or_default();
    for (name, value) in [
        ("Identity", row.id.clone()),
        ("Serial", row.serial.clone()),
        ("Not before", row.not_before.clone()),
        ("Not after", expiry(&row.not_after, now)),
        ("Source", row.source.clone()),
        ("State", row.state.clone()),
        ("Next renewal", known(&row.next_renewal)),
        ("Last error", known(&row.last_error)),
    ] {
        table.row([format!("{name}:"), value]);
    }
    let mut text = table.render(false);
    for line in row.pem.iter().flat_map(|pem| pem.lines()) {
        text.push_str(&printable(line));
        text.push('\n');
    }
    text
}

impl Show for CertificateRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut columns = vec![("IDENTITY", Left), ("STATE", Left), ("EXPIRES", Left), ("RENEWAL", Left)];
        if view.wide {
            columns.extend([("SERIAL", Left), ("SOURCE", Left)]);
        }
        columns.push(("LAST-ERROR", Left));
        let mut table = Table::new(&columns);
        for row in items {
            let known = |text: &Option<String>| text.clone().unwrap_or_default();
            let cells = [row.id.clone(), row.state.clone(), expiry(&row.not_after, view.now), known(&row.next_renewal)];
            let more = [row.serial.clone(), row.source.clone()].into_iter().filter(|_| view.wide);
            table.row(cells.into_iter().chain(more).chain([known(&row.last_error)]));
        }
        table.render(view.headers)
    }
}

impl Show for RootRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[
            ("SUBJECT", Left),
            ("SERIAL", Left),
            ("EXPIRES", Left),
            ("SPKI-SHA256", Left),
            ("VERSION", Right),
        ]);
        for row in items {
            let expires = expiry(&row.not_after, view.now);
            let cells = [row.subject.clone(), row.serial.clone(), expires, row.spki_sha256.clone()];
            table.row(cells.into_iter().chain([row.version.to_string()]));
        }
        table.render(view.headers)
    }
}

impl Show for RotationRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[("IDENTITY", Left), ("RENEWING", Right)]);
        for row in items {
            table.row([row.id.clone().unwrap_or_else(|| "all".to_owned()), row.identities.to_string()]);
        }
        table.render(view.headers)
    }
}

#[cfg(test)]
mod tests;
