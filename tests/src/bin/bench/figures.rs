//! What was measured, round by round: the names of the figures, their tables.

use crate::machine::middle;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Whether more or less of something is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    More,
    Less,
}

/// One kind of figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Metric {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
}

impl Metric {
    pub(crate) fn more(id: impl Into<String>, title: impl Into<String>, unit: &'static str) -> Self {
        Self { id: id.into(), title: title.into(), unit, better: Better::More }
    }

    pub(crate) fn less(id: impl Into<String>, title: impl Into<String>, unit: &'static str) -> Self {
        Self { id: id.into(), title: title.into(), unit, better: Better::Less }
    }
}

/// All rounds of a metric, by plane.
#[derive(Debug, Serialize)]
pub(crate) struct Series {
    #[serde(flatten)]
    pub(crate) metric: Metric,
    pub(crate) rounds: BTreeMap<&'static str, Vec<f64>>,
}

impl Series {
    pub(crate) fn median(&self, plane: &str) -> Option<f64> {
        self.rounds.get(plane).map(|figures| middle(figures))
    }

    fn cell(&self, plane: &str) -> Option<String> {
        let (median, (least, most)) = (self.median(plane)?, self.range(plane)?);
        let range =
            if self.rounds[plane].len() > 1 { format!(" ({} - {})", short(least), short(most)) } else { String::new() };
        Some(short(median) + &range)
    }

    /// Smallest and largest.
    pub(crate) fn range(&self, plane: &str) -> Option<(f64, f64)> {
        let figures = self.rounds.get(plane)?;
        let fold = |start: f64, pick: fn(f64, f64) -> f64| figures.iter().copied().fold(start, pick);
        Some((fold(f64::INFINITY, f64::min), fold(f64::NEG_INFINITY, f64::max)))
    }
}

/// In the order in which they were first taken.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub(crate) struct Figures(Vec<Series>);

impl Figures {
    pub(crate) fn take(&mut self, plane: &'static str, metric: Metric, figure: f64) {
        let known = self.0.iter().position(|series| series.metric.id == metric.id);
        let number = known.unwrap_or_else(|| {
            self.0.push(Series { metric, rounds: BTreeMap::new() });
            self.0.len() - 1
        });
        self.0[number].rounds.entry(plane).or_default().push(figure);
    }

    pub(crate) fn series(&self) -> impl Iterator<Item = &Series> {
        self.0.iter()
    }

    /// Tables in Markdown, one for each baseline: a row a metric, a column a plane; the median of each, in parentheses
    /// the smallest and largest if there were several rounds.
    pub(crate) fn tables(&self, planes: &[(&'static str, &'static str)]) -> String {
        let mut baselines: Vec<_> = planes.iter().map(|(_, baseline)| *baseline).collect();
        baselines.dedup();
        let columns = |baseline| planes.iter().filter(move |plane| plane.1 == baseline).map(|plane| plane.0);
        baselines.into_iter().map(|baseline| self.table(&columns(baseline).collect::<Vec<_>>())).collect()
    }

    fn table(&self, planes: &[&'static str]) -> String {
        let mut text = format!("\n| | better | {} |\n|---|---|{}\n", planes.join(" | "), "---:|".repeat(planes.len()));
        for series in &self.0 {
            let Metric { title, unit, better, .. } = &series.metric;
            let cells: Vec<_> = planes.iter().map(|plane| series.cell(plane)).collect();
            if cells.iter().any(Option::is_some) {
                let better = if *better == Better::More { "more" } else { "less" };
                let cells: Vec<_> = cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".to_owned())).collect();
                writeln!(text, "| {title}, {unit} | {better} | {} |", cells.join(" | "))
                    .expect("a string takes everything");
            }
        }
        text
    }
}

/// Three significant digits, or all of those before the point.
pub(crate) fn short(figure: f64) -> String {
    let before = figure.abs().max(1e-9).log10().floor() as i32 + 1;
    format!("{figure:.*}", usize::try_from(3 - before).unwrap_or(0).min(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_with_three_digits() {
        let shown = [0.0, 0.012_34, 0.5, 1.234, 12.34, 123.4, 1234.5].map(short);
        assert_eq!(shown, ["0.0000", "0.0123", "0.500", "1.23", "12.3", "123", "1234"]);
    }

    #[test]
    fn planes_stand_beside_their_baseline() {
        let mut figures = Figures::default();
        for (plane, figure) in [("direct", 9.0), ("direct", 10.0), ("direct", 11.0), ("lanes", 5.0)] {
            figures.take(plane, Metric::more("bulk", "Bulk", "Gbit/s"), figure);
        }
        let tables = figures.tables(&[("local", "local"), ("direct", "direct"), ("lanes", "direct")]);
        assert!(tables.contains("| Bulk, Gbit/s | more | 10.0 (9.00 - 11.0) | 5.00 |\n"), "{tables}");
        assert_eq!(tables.matches("Bulk").count(), 1, "a table without figures has no rows: {tables}");
    }
}
