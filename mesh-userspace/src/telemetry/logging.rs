//! The daemon's log: one line per event on standard error, for people (`text`) or for machines (`json`).
//!
//! Levels, once for all rooms. *error*: the daemon cannot do what it is configured to do, and somebody must act. *warn*:
//! something failed that the daemon copes with (a refused peer, a broken catalog file). *info*: what an operator wants in
//! a calm log: start, stop, applied changes, one line per finished connection. *debug*: each step of one connection.
//! *trace*: each frame.

use super::access_line::AccessLines;
use super::log_lines::Lines;
use serde::Deserialize;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

pub use super::log_lines::gathered;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// What is logged: a level, or levels per module (`info,mesh_userspace::tunnel=debug`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(String);

/// Why a filter was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{directive:?} in the log level {filter:?} is not valid: {reason}; use off, error, warn, info, debug or trace, \
     or <module>=<level>, separated by commas"
)]
pub struct InvalidFilter {
    filter: String,
    directive: String,
    reason: String,
}

/// Why the log could not be set up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    #[error(transparent)]
    Filter(#[from] InvalidFilter),
    #[error("the log was set up before")]
    AlreadySet,
}

impl Default for Filter {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl Filter {
    /// # Errors
    /// Names the part of the filter that is wrong.
    pub fn parse(filter: &str) -> Result<Self, InvalidFilter> {
        let refuse = |directive: &str, reason: &str| {
            Err(InvalidFilter { filter: filter.to_owned(), directive: directive.to_owned(), reason: reason.to_owned() })
        };
        if filter.trim().is_empty() {
            return refuse(filter, "it is empty");
        }
        for directive in filter.split(',').map(str::trim) {
            let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level);
            // A mistyped level would otherwise be taken for the name of a module, and log everything of it.
            if level.parse::<LevelFilter>().is_err() || level.bytes().all(|b| b.is_ascii_digit()) {
                return refuse(directive, "it names no level");
            }
            if let Err(error) = EnvFilter::builder().parse(directive) {
                return refuse(directive, &error.to_string());
            }
        }
        Ok(Self(filter.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Sends the log to standard error from now on.
///
/// # Errors
/// If the filter is not valid (see [`Filter::parse`]), or the process has a log already.
pub fn init(filter: &str, format: Format) -> Result<(), InitError> {
    let filter = Filter::parse(filter)?;
    let subscriber = subscriber(&filter, format, std::io::stderr().is_terminal(), Lines(std::io::stderr));
    tracing::subscriber::set_global_default(subscriber).map_err(|_| InitError::AlreadySet)
}

fn subscriber<W>(filter: &Filter, format: Format, ansi: bool, writer: W) -> Box<dyn tracing::Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::builder().parse_lossy(&filter.0);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(ansi);
    match format {
        Format::Text => Box::new(builder.finish()),
        Format::Json => {
            let builder = builder.json().flatten_event(true).with_current_span(false);
            Box::new(builder.map_event_format(AccessLines).finish())
        }
    }
}

/// Runs `work` with a log of its own and gives back what was written.
#[cfg(test)]
pub(super) fn captured(filter: &str, format: Format, work: impl FnOnce()) -> String {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);
    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    let buffer = Buffer::default();
    let writer = buffer.clone();
    let subscriber = subscriber(&Filter::parse(filter).unwrap(), format, false, move || writer.clone());
    tracing::subscriber::with_default(subscriber, work);
    let bytes = buffer.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_named() {
        for (filter, directive) in [
            ("inffo", "inffo"),
            ("", ""),
            ("info,tunnel", "tunnel"),
            ("info,tunnel=loud", "tunnel=loud"),
            ("info,", ""),
            ("3", "3"),
        ] {
            let error = Filter::parse(filter).unwrap_err();
            assert_eq!((error.filter.as_str(), error.directive.as_str()), (filter, directive));
            assert!(error.to_string().contains(&format!("{directive:?} in the log level {filter:?}")), "{error}");
        }
        for good in ["info", "OFF", "warn,mesh_userspace::tunnel=debug", "info, access=off"] {
            assert_eq!(Filter::parse(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn the_filter_decides_what_is_written() {
        let text = captured("warn,tunnel=debug", Format::Text, || {
            tracing::info!("calm");
            tracing::warn!("loud");
            tracing::debug!(target: "tunnel", "detail");
        });
        assert!(text.contains("loud") && text.contains("detail") && !text.contains("calm"), "{text}");
    }

    #[test]
    fn json_lines_carry_the_fields_at_the_top() {
        let text = captured("info", Format::Json, || tracing::info!(answer = 42, "hello"));
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&line["answer"], &line["message"], &line["level"]), (&42.into(), &"hello".into(), &"INFO".into()));
    }
}
