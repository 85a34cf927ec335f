//! Time of what runs often: `cargo xtask bench micro` runs it, with figures of the kernel's programs beside it.

mod subjects;

use criterion::Criterion;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for mut subject in subjects::all() {
        criterion.bench_function(&subject.name, |bencher| bencher.iter(|| (subject.run)()));
    }
    criterion.final_summary();
}
