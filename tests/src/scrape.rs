//! Reading a daemon's HTTP port from inside its node, and what `/metrics` says.

use crate::namespace;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(5);

/// An HTTP status and a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

/// GETs a path over plain HTTP from inside a namespace.
///
/// # Errors
/// If there is no connection or no HTTP response within 5 s.
pub fn get(namespace: &Path, address: SocketAddr, path: &str) -> Result<Response> {
    let text = namespace::enter(namespace, || -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        // Version 1.0: the response ends with the connection and is never chunked.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?
    .with_context(|| format!("GET http://{address}{path}"))?;
    parse_response(&text)
}

fn parse_response(text: &str) -> Result<Response> {
    let (head, body) = text.split_once("\r\n\r\n").context("the response has no end of headers")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("the response has no status")?;
    Ok(Response { status, body: body.to_owned() })
}

/// One reading of `/metrics`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    samples: Vec<Sample>,
    text: String,
}

/// One line of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Metrics {
    /// # Errors
    /// If a line is neither a comment nor a sample.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples =
            lines.map(|line| parse_sample(line).with_context(|| format!("in {line:?}"))).collect::<Result<_>>()?;
        Ok(Self { samples, text: text.to_owned() })
    }

    /// Sum of the samples of a name whose labels include these; 0 if there are none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }

    /// [`Self::sum`] of something that is counted in whole units.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counters are whole and not negative")]
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.sum(name, labels).round() as u64
    }

    /// How often a kernel hook came to an outcome.
    #[must_use]
    pub fn outcome(&self, hook: &str, reason: &str) -> u64 {
        self.count("nodemesh_kernel_outcomes_total", &[("hook", hook), ("reason", reason)])
    }

    /// Connections that began, as one side (`source` or `destination`) reports them.
    #[must_use]
    pub fn opened(&self, reporter: &str) -> u64 {
        self.count("nodemesh_tcp_connections_opened_total", &[("reporter", reporter)])
    }

    /// Connections that failed for a reason, as one side reports them.
    #[must_use]
    pub fn failed(&self, reporter: &str, reason: &str) -> u64 {
        self.count("nodemesh_tcp_connections_failed_total", &[("reporter", reporter), ("reason", reason)])
    }

    /// The samples of a name whose labels include these.
    pub fn matching(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name && labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|v| v == value))
        })
    }

    /// All samples.
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// As it came over the wire.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// What happened between two readings.
#[derive(Clone, Debug)]
pub struct Change {
    pub before: Metrics,
    pub after: Metrics,
}

impl Change {
    /// By how much something grew that is read like this.
    ///
    /// # Panics
    /// If it shrank: the daemon forgot what it had counted.
    #[must_use]
    pub fn of(&self, read: impl Fn(&Metrics) -> u64) -> u64 {
        let (before, after) = (read(&self.before), read(&self.after));
        after.checked_sub(before).unwrap_or_else(|| panic!("a counter went from {before} to {after}"))
    }

    /// [`Self::of`] a kernel hook's outcome.
    #[must_use]
    pub fn outcome(&self, hook: &str, reason: &str) -> u64 {
        self.of(|metrics| metrics.outcome(hook, reason))
    }

    /// Every outcome that was counted, as `hook/reason`, with its number.
    #[must_use]
    pub fn outcomes(&self) -> BTreeMap<String, u64> {
        let samples = self.after.matching("nodemesh_kernel_outcomes_total", &[]);
        let names = samples.map(|sample| (sample.labels["hook"].clone(), sample.labels["reason"].clone()));
        let changes = names.map(|(hook, reason)| (format!("{hook}/{reason}"), self.outcome(&hook, &reason)));
        changes.filter(|(_, change)| *change > 0).collect()
    }
}

fn parse_sample(line: &str) -> Result<Sample> {
    // An exemplar follows the value after " # ".
    let (head, value) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, after) = parse_labels(rest)?;
            ((name, labels), after)
        }
        None => {
            let (name, value) = line.split_once(' ').context("a sample has a value")?;
            ((name, BTreeMap::new()), value)
        }
    };
    let value = value.split_ascii_whitespace().next().context("a sample has a value")?;
    let value = value.parse().with_context(|| format!("{value:?} is no number"))?;
    Ok(Sample { name: head.0.to_owned(), labels: head.1, value })
}

/// Parses `key="value",...}` and returns what follows the brace.
fn parse_labels(mut rest: &str) -> Result<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(after) = rest.strip_prefix('}') {
            return Ok((labels, after));
        }
        let (key, quoted) = rest.split_once("=\"").context("a label has a quoted value")?;
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        rest = loop {
            match characters.next() {
                Some((_, '\\')) => match characters.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, other)) => value.push(other),
                    None => bail!("a label's value ends in a backslash"),
                },
                Some((at, '"')) => break &quoted[at + 1..],
                Some((_, other)) => value.push(other),
                None => bail!("a label's value has no end"),
            }
        };
        labels.insert(key.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_over_the_labels_that_were_not_asked_for() {
        let metrics = Metrics::parse(concat!(
            "# TYPE a counter\n",
            "a_total{x=\"1\",y=\"p,}q\"} 2 # {trace_id=\"z\"} 1\n",
            "a_total{x=\"1\",y=\"\\\"\\\\\\n\"} 3\n",
            "a_total{x=\"2\",y=\"\"} 10\n",
            "b 1.5e1\n",
            "# EOF\n",
        ))
        .unwrap();
        assert_eq!(metrics.count("a_total", &[("x", "1")]), 5);
        assert_eq!(metrics.count("a_total", &[]), 15);
        assert_eq!(metrics.count("a_total", &[("y", "p,}q")]), 2);
        assert_eq!(metrics.count("a_total", &[("y", "\"\\\n")]), 3);
        assert_eq!(metrics.count("b", &[]), 15);
        assert_eq!(metrics.count("c", &[]), 0);
    }

    #[test]
    fn what_is_no_exposition_is_an_error() {
        for bad in ["a", "a{b=\"c} 1", "a{b} 1", "a x"] {
            assert!(Metrics::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_response_has_a_status_and_a_body() {
        let response = parse_response("HTTP/1.0 503 Service Unavailable\r\nx: y\r\n\r\nnot yet").unwrap();
        assert_eq!(response, Response { status: 503, body: "not yet".into() });
        assert!(parse_response("nonsense").is_err());
    }
}
