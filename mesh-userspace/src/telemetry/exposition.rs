//! The text formats of a scrape.
//!
//! Metrics are encoded as OpenMetrics 1.0; the older Prometheus text 0.0.4 is derived from that. They differ in names:
//! OpenMetrics describes a counter `x` whose sample is `x_total`, the older format describes `x_total`; it has neither
//! the type `info` nor units nor an end mark.

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::registry::Registry;
use std::fmt::Write;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus 0.0.4, which every tool reads (`promtool check metrics` reads nothing else).
    Prometheus,
}

impl Format {
    /// OpenMetrics if the header prefers it by name, as a Prometheus server does; else Prometheus 0.0.4.
    #[must_use]
    pub fn negotiate(accept: Option<&str>) -> Self {
        let quality = |name: &str| {
            let ranges = accept.unwrap_or_default().split(',');
            ranges.filter_map(|range| quality_of(range, name)).fold(0, u16::max)
        };
        let open_metrics = quality("application/openmetrics-text");
        if open_metrics > 0 && open_metrics >= quality("text/plain") { Self::OpenMetrics } else { Self::Prometheus }
    }

    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The quality, in thousandths, that one media range of an `Accept` header gives to a type, if it names it.
fn quality_of(range: &str, name: &str) -> Option<u16> {
    let mut parts = range.split(';').map(str::trim);
    if !parts.next()?.eq_ignore_ascii_case(name) {
        return None;
    }
    let quality = parts.find_map(|parameter| parameter.strip_prefix("q=").or_else(|| parameter.strip_prefix("Q=")));
    let quality: f32 = quality.map_or(Some(1.0), |text| text.parse().ok())?;
    // `as` saturates: a quality out of range counts as the nearest allowed one.
    Some((quality.clamp(0.0, 1.0) * 1000.0) as u16)
}

/// Encodes registries one after the other.
pub(super) fn encode(format: Format, registries: &[&Registry]) -> String {
    let mut text = String::with_capacity(64 * 1024);
    let encoded = registries.iter().try_for_each(|registry| encode_registry(&mut text, registry));
    if encoded.and_then(|()| encode_eof(&mut text)).is_err() {
        // Writing to a string cannot fail, so a collector did; what was written before it is still valid.
        tracing::error!("a metric could not be encoded; the scrape is cut short");
    }
    match format {
        Format::OpenMetrics => text,
        Format::Prometheus => downgrade(&text),
    }
}

fn downgrade(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 1024);
    let mut help = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // Kept until the type, on the next line, tells the name's suffix.
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, text)) = help.take() {
                // Writing to a string cannot fail.
                let _ = writeln!(out, "# HELP {name}{suffix} {text}");
            }
            let _ = writeln!(out, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with("# ") {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_what_the_client_prefers() {
        let prometheus_2_42 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert_eq!(Format::negotiate(Some(prometheus_2_42)), Format::OpenMetrics);
        assert_eq!(Format::negotiate(Some("Application/OpenMetrics-Text")), Format::OpenMetrics);
        for classic in [
            None,
            Some(""),
            Some("*/*"),
            Some("text/plain"),
            Some("text/plain;version=0.0.4, application/openmetrics-text;q=0.2"),
            Some("application/openmetrics-text;q=0"),
            Some("application/openmetrics-text;q=nonsense"),
        ] {
            assert_eq!(Format::negotiate(classic), Format::Prometheus, "{classic:?}");
        }
    }

    #[test]
    fn the_older_format_has_its_own_names_and_types() {
        let text = "# HELP a_build Build.\n# TYPE a_build info\na_build_info{v=\"# EOF\"} 1\n\
                    # HELP a_sent_bytes Sent.\n# TYPE a_sent_bytes counter\n# UNIT a_sent_bytes bytes\n\
                    a_sent_bytes_total 3\n# HELP g G.\n# TYPE g gauge\ng 1\n# EOF\n";
        let classic = "# HELP a_build_info Build.\n# TYPE a_build_info gauge\na_build_info{v=\"# EOF\"} 1\n\
                       # HELP a_sent_bytes_total Sent.\n# TYPE a_sent_bytes_total counter\na_sent_bytes_total 3\n\
                       # HELP g G.\n# TYPE g gauge\ng 1\n";
        assert_eq!(downgrade(text), classic);
    }
}
