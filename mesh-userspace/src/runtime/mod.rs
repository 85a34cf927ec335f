//! Process primitives: readiness, supervised tasks, the threads that carry traffic, bounds, congestion control. A leaf: imports nothing of this crate.

mod accept;
mod cancellation;
mod congestion;
mod cores;
mod descriptors;
mod polling;
mod ready;
mod room;
mod task;
mod turn;

pub use accept::Acceptor;
pub use cancellation::Cancellation;
pub use congestion::unpace;
pub use cores::{CoreThreads, Cores, Seat};
pub use descriptors::{Descriptor, Descriptors};
pub use polling::{Conversation, Direction, Polled};
pub use ready::{Blocker, Ready};
pub use room::{Level, Place, Room};
pub use task::{Exit, Tasks};
pub use turn::{Turn, let_others};
