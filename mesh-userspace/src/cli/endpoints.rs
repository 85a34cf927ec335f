//! `nodemesh get endpoints`.

use super::show::{Show, View, seconds};
use super::table::Align::{Left, Right};
use super::table::Table;
use crate::admin::endpoints::EndpointRow;
use std::time::Duration;

impl Show for EndpointRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[
            ("SERVICE", Left),
            ("FRONTEND", Left),
            ("WORKLOAD", Left),
            ("ADDRESS", Left),
            ("NODE", Left),
            ("STATE", Left),
            ("OPEN", Right),
            ("PENDING", Right),
            ("CONNECT", Right),
            ("BACK-IN", Right),
        ]);
        for row in items {
            let state =
                row.cause.as_ref().map_or_else(|| row.state.clone(), |cause| format!("{} ({cause})", row.state));
            let connect = row.connect_micros.map(|micros| format!("{:?}", Duration::from_micros(micros)));
            let back = row.ejected_millis.map(|millis| seconds(Duration::from_millis(millis).as_secs_f64()));
            table.row([
                row.service.clone(),
                frontend(row),
                row.workload.clone(),
                row.address.clone(),
                row.node.clone(),
                state,
                row.open.to_string(),
                row.pending.to_string(),
                connect.unwrap_or_else(|| "-".to_owned()),
                back.unwrap_or_else(|| "-".to_owned()),
            ]);
        }
        table.render(view.headers)
    }
}

/// The protocol follows where it is not TCP.
fn frontend(row: &EndpointRow) -> String {
    match row.protocol.as_str() {
        "" | "tcp" => row.frontend.clone(),
        protocol => format!("{}/{protocol}", row.frontend),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ejected_endpoint_says_why_and_for_how_long() {
        let row = EndpointRow {
            service: "shop/cart".into(),
            frontend: "10.96.0.1:53".into(),
            protocol: "udp".into(),
            workload: "shop/cart-1".into(),
            address: "10.0.0.2:8080".into(),
            node: "n2".into(),
            state: "ejected".into(),
            open: 3,
            pending: 1,
            cause: Some("timeout".into()),
            ejected_millis: Some(7_000),
            connect_micros: Some(1_500),
        };
        let text =
            EndpointRow::show(&[row], &View { wide: false, headers: false, now: std::time::SystemTime::UNIX_EPOCH });
        for part in ["shop/cart-1", "10.96.0.1:53/udp", "ejected (timeout)", "1.5ms", "7s"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
