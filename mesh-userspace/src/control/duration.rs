//! Durations as Kubernetes and Go write them: whole numbers with units, as in `1m30s`.

use super::Code;
use super::diagnostic::Findings;
use super::yaml::{Node, Value};
use std::fmt::Write;
use std::time::Duration;

/// Units from the largest to the smallest, in milliseconds.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Gateway API's form (GEP-2257): one to four numbers of at most five digits, each with its unit. Units may come in any
/// order and more than once, as in Go; there are no fractions.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    for _ in 0..UNITS.len() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at_checked(digits).filter(|_| (1..=5).contains(&digits))?;
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at_checked(letters)?;
        let (_, millis) = UNITS.iter().find(|(name, _)| *name == unit)?;
        total += Duration::from_millis(number.parse::<u64>().ok()? * millis);
        rest = after;
        if rest.is_empty() {
            return Some(total);
        }
    }
    None
}

/// The duration with as few units as possible, as [`parse`] reads it; what is below a millisecond is left out.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let mut left = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, millis) in UNITS {
        if left >= millis {
            // Writing to a string cannot fail.
            let _ = write!(text, "{}{unit}", left / millis);
            left %= millis;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// A duration from `min` to `max`, both included.
pub(super) fn duration(
    node: &Node,
    path: &str,
    (min, max): (Duration, Duration),
    findings: &mut Findings,
) -> Option<Duration> {
    let (text, is_text) = match &node.value {
        Value::Text(text) => (text.as_str(), true),
        Value::Number(text) => (text.as_str(), false),
        other => {
            let message = format!("`{path}` must be a duration, found {}", other.describe());
            findings.report(Code::WrongType, node.at, message, Some("write it as in 1m30s".to_owned()));
            return None;
        }
    };
    let shown: String = text.chars().take(40).collect();
    let Some(duration) = parse(text).filter(|_| is_text) else {
        let help = if !text.is_empty() && text.len() <= 5 && text.bytes().all(|byte| byte.is_ascii_digit()) {
            format!("give it a unit: {text}s or {text}ms")
        } else {
            "write whole numbers with the units h, m, s, ms, as in 1m30s".to_owned()
        };
        findings.report(Code::InvalidDuration, node.at, format!("`{path}`: `{shown}` is not a duration"), Some(help));
        return None;
    };
    if duration < min || duration > max {
        let (min, max) = (format_duration(min), format_duration(max));
        let message = format!("`{path}` must be from {min} to {max}, found `{shown}`");
        findings.report(Code::InvalidDuration, node.at, message, None);
        return None;
    }
    Some(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_gateway_api_writes_them() {
        let good = [
            ("0s", 0),
            ("200ms", 200),
            ("5s", 5_000),
            ("1m30s", 90_000),
            ("1h2m3s4ms", 3_723_004),
            ("30s1m", 90_000),
            ("99999h", 99_999 * 3_600_000),
        ];
        for (text, millis) in good {
            assert_eq!(parse(text), Some(Duration::from_millis(millis)), "{text}");
        }
        let bad = [
            "",
            "5",
            "s",
            "-5s",
            "+5s",
            "1.5h",
            "5 s",
            "5S",
            "1us",
            "100000s",
            "1h1m1s1ms1s",
            "5s ",
            "٣s",
            "5sm",
            "1d",
        ];
        for text in bad {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for millis in [0, 1, 999, 1_000, 1_001, 59_999, 60_000, 90_500, 3_600_000, 86_400_000, 90_061_001] {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse(&format_duration(duration)), Some(duration));
        }
        assert_eq!(format_duration(Duration::from_secs(5_400)), "1h30m");
        assert_eq!(format_duration(Duration::from_nanos(1)), "0s");
    }
}
