//! A picture a metric: a bar for each plane's median, a line from its smallest to its largest figure.

use crate::figures::{Better, Series, short};
use std::fmt::Write;

const WIDTH: f64 = 720.0;
const LABELS: f64 = 150.0;
const FIGURES: f64 = 80.0;
const ROW: f64 = 26.0;
const TOP: f64 = 44.0;

/// Planes in their order, those of the mesh in another colour.
pub(crate) fn svg(series: &Series, planes: &[(&'static str, &'static str)]) -> String {
    let rows: Vec<_> =
        planes.iter().filter_map(|(plane, _)| Some((*plane, series.median(plane)?, series.range(plane)?))).collect();
    let most = rows.iter().map(|(_, _, (_, most))| *most).fold(f64::MIN_POSITIVE, f64::max);
    let scale = |figure: f64| figure / most * (WIDTH - LABELS - FIGURES);
    let height = TOP + ROW * rows.len() as f64 + 8.0;
    let better = if series.metric.better == Better::More { "more" } else { "less" };
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"8\" y=\"20\" \
         font-weight=\"bold\">{}</text>\n<text x=\"8\" y=\"36\" fill=\"#666\">{}, {better} is better; median, smallest \
         to largest</text>\n",
        series.metric.title, series.metric.unit
    );
    for (number, (plane, median, (least, largest))) in rows.iter().enumerate() {
        let y = TOP + ROW * number as f64;
        let colour = if is_mesh(plane) { "#2a6fbb" } else { "#b0b7bf" };
        let middle = y + ROW / 2.0;
        let (from, to) = (LABELS + scale(*least), LABELS + scale(*largest));
        writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{plane}</text><rect x=\"{LABELS}\" y=\"{}\" width=\"{:.1}\" \
             height=\"{}\" fill=\"{colour}\"/><line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle}\" y2=\"{middle}\" \
             stroke=\"black\"/><text x=\"{:.1}\" y=\"{}\">{}</text>",
            LABELS - 8.0,
            middle + 4.0,
            y + 4.0,
            scale(*median),
            ROW - 8.0,
            to + 6.0,
            middle + 4.0,
            short(*median)
        )
        .expect("a string takes everything");
    }
    text.push_str("</svg>\n");
    text
}

fn is_mesh(plane: &str) -> bool {
    plane.starts_with("same-node") || ["lanes", "quic"].contains(&plane)
}

#[cfg(test)]
mod tests {
    use super::svg;
    use crate::figures::{Metric, Series};
    use std::collections::BTreeMap;

    #[test]
    fn every_plane_that_was_measured_has_a_bar() {
        let rounds = BTreeMap::from([("direct", vec![2.0, 4.0, 3.0]), ("lanes", vec![1.0])]);
        let series = Series { metric: Metric::more("bulk", "Bulk", "Gbit/s"), rounds };
        let text = svg(&series, &[("direct", "direct"), ("lanes", "direct"), ("quic", "direct")]);
        assert_eq!(text.matches("<line").count(), 2);
        assert!(text.contains(">3.00</text>") && !text.contains(">quic<"), "{text}");
    }
}
