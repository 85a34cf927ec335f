//! A catalog of many services whose endpoints are on a node that does not exist.

use anyhow::Result;
use mesh_tests::catalog::Catalog;
use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Endpoints of each service.
pub(crate) const ENDPOINTS: u32 = 10;
/// Services in one file: it stays well below what a file may have.
const IN_A_FILE: u32 = 500;
/// The node that the endpoints are on.
const FAR: &str = "far";

/// Writes this many services and their endpoints as files of the catalog.
pub(crate) fn write(catalog: &Catalog, services: u32) -> Result<()> {
    catalog.write_file("far.yaml", &far_node())?;
    for first in (0..services).step_by(IN_A_FILE as usize) {
        let mut text = String::new();
        for service in first..services.min(first + IN_A_FILE) {
            write_service(&mut text, service)?;
            for endpoint in 0..ENDPOINTS {
                text.push_str(&workload(service, endpoint, 100));
            }
        }
        catalog.write_file(&format!("many-{first}.yaml"), &text)?;
    }
    Ok(())
}

fn far_node() -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {FAR}}}\nstatus:\n  addresses:\n  - {{type: InternalIP, address: \
         192.0.2.1}}\n---\n"
    )
}

fn write_service(text: &mut String, service: u32) -> Result<()> {
    let vip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 97, 0, 1)) + service);
    let vip6 = Ipv6Addr::from(u128::from(Ipv6Addr::new(0xfd97, 0, 0, 0, 0, 0, 0, 1)) + u128::from(service));
    write!(
        text,
        "apiVersion: v1\nkind: Service\nmetadata: {{name: many-{service}}}\nspec:\n  clusterIPs: [{vip}, \
         \"{vip6}\"]\n  selector: {{app: many-{service}}}\n  ports:\n  - {{port: 80, targetPort: 8080}}\n---\n"
    )?;
    Ok(())
}

/// One endpoint, as a document.
pub(crate) fn workload(service: u32, endpoint: u32, weight: u32) -> String {
    let index = service * ENDPOINTS + endpoint;
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 1)) + index);
    let address6 = Ipv6Addr::from(u128::from(Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, 0, 1)) + u128::from(index));
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata:\n  name: many-{service}-{endpoint}\n  labels: \
         {{app: many-{service}}}\nspec:\n  node: {FAR}\n  serviceAccount: many\n  addresses: [{address}, \
         \"{address6}\"]\n  weight: {weight}\n---\n"
    )
}
