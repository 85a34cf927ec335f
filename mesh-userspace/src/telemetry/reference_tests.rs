//! docs/METRICS.md lists what a scrape holds: no more, no less.

use super::tests::full;
use std::collections::BTreeMap;

const EDGE: &str = "reporter, source_workload, source_workload_namespace, source_canonical_service, source_principal, \
                    destination_workload, destination_workload_namespace, destination_canonical_service, \
                    destination_principal, destination_service, destination_service_name, \
                    destination_service_namespace, request_protocol, connection_security_policy";
const EDGE_LITE: &str = "reporter, source_workload_namespace, source_canonical_service, \
                         destination_workload_namespace, destination_canonical_service, destination_service, \
                         destination_service_name, destination_service_namespace, request_protocol, \
                         connection_security_policy";

#[derive(Default)]
struct Family {
    kind: String,
    help: String,
    labels: Vec<String>,
    has_samples: bool,
}

/// The families of a Prometheus text exposition by name.
fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            name.clone_into(&mut current);
            families.entry(name.to_owned()).or_default().help = help.to_owned();
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            families.entry(name.to_owned()).or_default().kind = kind.to_owned();
        } else {
            let family = families.get_mut(&current).expect("a sample follows its description");
            if !family.has_samples {
                family.labels = label_names(line);
                family.has_samples = true;
            }
        }
    }
    families
}

/// The label names of a sample, but for a histogram's `le`.
fn label_names(sample: &str) -> Vec<String> {
    let Some((_, mut rest)) = sample.split_once('{') else { return Vec::new() };
    let mut names = Vec::new();
    while let Some((name, value)) = rest.split_once("=\"") {
        names.push(name.trim_start_matches(',').to_owned());
        let mut escaped = false;
        let end = value.find(|c| {
            let is_end = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            is_end
        });
        rest = &value[end.expect("a label's value ends") + 1..];
        if rest.starts_with('}') {
            break;
        }
    }
    names.retain(|name| name != "le");
    names
}

fn table() -> String {
    let (_, text) = full().encode(None);
    let mut table = "| name | type | labels | what |\n|---|---|---|---|\n".to_owned();
    for (name, family) in families(&text) {
        assert!(family.has_samples, "{name} has no sample here, so its labels are not known: add one to `full`");
        let labels = family.labels.join(", ").replace(EDGE, "*edge*").replace(EDGE_LITE, "*edge-lite*");
        let row = format!("| `{name}` | {} | {labels} | {} |\n", family.kind, family.help);
        table.push_str(&row);
    }
    table
}

#[test]
fn the_reference_is_what_a_scrape_holds() {
    let document = include_str!("../../../docs/METRICS.md");
    let after = document.split_once("<!-- families -->\n").expect("the mark before the table").1;
    let written = after.split_once("<!-- /families -->").expect("the mark after the table").0;
    let table = table();
    assert!(written == table, "put this between the marks in docs/METRICS.md:\n\n{table}");
}

#[test]
fn the_reference_names_the_labels_of_an_edge() {
    let document = include_str!("../../../docs/METRICS.md");
    for (name, labels) in [("edge", EDGE), ("edge-lite", EDGE_LITE)] {
        let expected =
            format!("*{name}* = {}", labels.split(", ").map(|l| format!("`{l}`")).collect::<Vec<_>>().join(", "));
        let flat = document.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(flat.contains(&expected), "docs/METRICS.md does not say: {expected}");
    }
}
