//! Certificates and roots, as the admin interface shows them.

use crate::admin::Certificates;
use crate::admin::documents::{CertificateRow, RootRow, timestamp};
use crate::identity::{CertificateStatus, Identities, Root, pem};
use crate::model::SpiffeId;
use std::sync::Arc;

pub(super) fn sources(identities: &Identities) -> Certificates {
    let (list, chain, roots, rotate) = (identities.clone(), identities.clone(), identities.clone(), identities.clone());
    Certificates {
        list: Arc::new(move || rows(&list)),
        chain: Arc::new(move |id| Some(pem(&chain.chain(&SpiffeId::parse(id).ok()?)?))),
        bundle: Arc::new(move || {
            let (roots, version) = roots.bundle();
            roots.iter().map(|each| root(each, version)).collect()
        }),
        rotate: Arc::new(move |id| {
            let only = id.map(SpiffeId::parse).transpose().map_err(|error| error.to_string())?;
            rotate.rotate(only.as_ref()).map_err(|error| error.to_string())
        }),
    }
}

pub(super) fn rows(identities: &Identities) -> Vec<CertificateRow> {
    identities.status().into_iter().map(row).collect()
}

fn row(status: CertificateStatus) -> CertificateRow {
    let row = CertificateRow {
        id: status.id.to_string(),
        source: status.source.to_owned(),
        state: status.issuance.state.as_str().to_owned(),
        next_renewal: status.issuance.next_renewal.map(|at| timestamp(at.into())),
        last_error: status.issuance.last_error,
        ..CertificateRow::default()
    };
    match status.certificate {
        Some(held) => row.presenting(held.serial, held.not_before.into(), held.not_after.into()),
        None => row,
    }
}

fn root(root: &Root, version: u64) -> RootRow {
    RootRow {
        subject: root.subject.clone(),
        serial: root.serial.clone(),
        not_after: timestamp(root.not_after.into()),
        spki_sha256: root.public_key_sha256.clone(),
        version,
        pem: pem(std::slice::from_ref(&root.certificate)),
    }
}
