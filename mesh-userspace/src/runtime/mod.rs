//! Process primitives: readiness, supervised tasks. A leaf: imports nothing of this crate.

mod ready;
mod task;

pub use ready::{Blocker, Ready};
pub use task::{Exit, Tasks};
