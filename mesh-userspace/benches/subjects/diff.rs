//! From one desired state to the next, among a thousand services.

use super::Subject;
use super::catalog::{engine, workload};
use mesh_userspace::engine::{Tables, diff};
use mesh_userspace::model::{Object, Update};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

const SERVICES: u32 = 1_000;
/// The service whose workload moves.
const CHANGED: u32 = 500;

pub(super) fn subjects() -> Vec<Subject> {
    let mut engine = engine(SERVICES, 0, 0);
    let now = Instant::now();
    let before = engine.desired().clone();
    let away = {
        let mut workload = workload(CHANGED, 0);
        workload.addresses = vec!["10.200.0.1".parse().expect("an address")];
        Arc::new(workload)
    };
    let back = Arc::new(workload(CHANGED, 0));
    engine.handle_update(Update::Upsert(Object::Workload(Arc::clone(&away))), now);
    let after = engine.desired().clone();
    assert!(!diff(&before, &after).is_empty(), "the change is one of this node's tables");

    let (same, twin) = (before.clone(), before.clone());
    let (whole, empty) = (before.clone(), Tables::default());
    let mut turn = 0_u32;
    vec![
        Subject::new("diff/1000_services/no_change", move || {
            assert!(diff(black_box(&same), black_box(&twin)).is_empty());
        }),
        Subject::new("diff/1000_services/one_change", move || {
            black_box(diff(black_box(&before), black_box(&after)));
        }),
        Subject::new("diff/1000_services/from_nothing", move || {
            black_box(diff(black_box(&empty), black_box(&whole)));
        }),
        Subject::new("update/1000_services/one_change", move || {
            let old = engine.desired().clone();
            turn += 1;
            let next = if turn.is_multiple_of(2) { &away } else { &back };
            engine.handle_update(Update::Upsert(Object::Workload(Arc::clone(next))), now);
            black_box(diff(&old, engine.desired()));
        }),
    ]
}
