//! Access lines as JSON. They are most of what a busy daemon logs, and the general formatter is slow: it makes a serializer
//! of every value. What this one writes is the same, byte for byte.

use super::access_log::TARGET;
use std::fmt::{self, Write};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// What a line usually takes.
const USUAL_LENGTH: usize = 1024;

/// Formats access lines itself, and leaves all others to another formatter.
pub(super) struct AccessLines<F>(pub(super) F);

impl<S, N, F> FormatEvent<S, N> for AccessLines<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        // The names of spans would have to be told, too.
        if event.metadata().target() != TARGET || ctx.lookup_current().is_some() {
            return self.0.format_event(ctx, writer, event);
        }
        let mut line = String::with_capacity(USUAL_LENGTH);
        line.push_str("{\"timestamp\":\"");
        SystemTime.format_time(&mut Writer::new(&mut line))?;
        line.push_str("\",\"level\":\"");
        line.push_str(event.metadata().level().as_str());
        line.push('"');
        event.record(&mut Line(&mut line));
        line.push_str(",\"target\":\"");
        line.push_str(TARGET);
        line.push_str("\"}\n");
        writer.write_str(&line)
    }
}

struct Line<'a>(&'a mut String);

impl Line<'_> {
    fn key(&mut self, field: &Field) {
        self.0.push_str(",\"");
        self.0.push_str(field.name());
        self.0.push_str("\":");
    }

    fn shown(&mut self, field: &Field, value: impl fmt::Display) {
        self.key(field);
        // Writing to a string cannot fail.
        let _ = write!(self.0, "{value}");
    }
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.key(field);
        self.0.push('"');
        escape(self.0, value);
        self.0.push('"');
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.shown(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.shown(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.shown(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.key(field);
        self.0.push('"');
        // Likewise.
        let _ = write!(Escaped(self.0), "{value:?}");
        self.0.push('"');
    }
}

struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        escape(self.0, text);
        Ok(())
    }
}

fn escape(line: &mut String, text: &str) {
    if !text.bytes().any(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
        return line.push_str(text);
    }
    for symbol in text.chars() {
        match symbol {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            '\u{8}' => line.push_str("\\b"),
            '\u{c}' => line.push_str("\\f"),
            control if control < ' ' => {
                // Likewise.
                let _ = write!(line, "\\u{:04x}", control as u32);
            }
            other => line.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::telemetry::logging::{Format, captured};

    /// The line without its timestamp and its target.
    fn rest(line: &str) -> &str {
        let (_, rest) = line.split_once("Z\",").expect("a timestamp in UTC");
        rest.rsplit_once(",\"target\":\"").expect("a target").0
    }

    #[test]
    fn an_access_line_is_what_the_general_formatter_writes() {
        let same = |write: fn(bool)| {
            let own = captured("info", Format::Json, || write(true));
            let general = captured("info", Format::Json, || write(false));
            assert_eq!(rest(&own), rest(&general));
            assert_eq!((own.len() - own.trim_end().len(), own.lines().count()), (1, 1), "{own:?}");
            serde_json::from_str::<serde_json::Value>(&own).expect("JSON");
        };
        macro_rules! event {
            ($($event:tt)*) => {
                same(|is_own| {
                    if is_own {
                        tracing::warn!(target: "access", { $($event)* }, "a \"line\"");
                    } else {
                        tracing::warn!(target: "general", { $($event)* }, "a \"line\"");
                    }
                })
            };
        }
        event!(src.addr = tracing::field::display("10.0.0.1:80"), bytes = 5_u64, less = -5_i64, yes = true);
        event!(nobody = None::<&str>, error = "a \"quoted\"\\ line\nand\tmore \u{1} \u{8}\u{c}\r \u{7f} ü");
        event!(error = tracing::field::display("shown \"so\"\n"), debug = tracing::field::debug(Some("x\ty")));
    }

    #[test]
    fn a_line_within_a_span_names_it() {
        let line = captured("info", Format::Json, || {
            tracing::info_span!("outer").in_scope(|| tracing::info!(target: "access", "done"));
        });
        assert!(line.contains("\"spans\":[{\"name\":\"outer\"}]"), "{line}");
    }
}
