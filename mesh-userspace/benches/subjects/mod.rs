//! What is measured: by criterion in time (`micro.rs`), by valgrind in instructions (`instructions.rs`). Whatever has a
//! choice (draws, callers, orders) makes the same one in each run.

mod catalog;
mod diff;
mod pick;
mod policy;
mod relay;

/// A piece of work that can be repeated without end: it leaves things as it found them, or as good.
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) run: Box<dyn FnMut()>,
}

impl Subject {
    fn new(name: impl Into<String>, run: impl FnMut() + 'static) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// All subjects, ready to run.
pub(crate) fn all() -> Vec<Subject> {
    [relay::subjects(), pick::subjects(), policy::subjects(), diff::subjects()].into_iter().flatten().collect()
}
