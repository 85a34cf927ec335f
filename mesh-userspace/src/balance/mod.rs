//! Which endpoint a new connection goes to, and which ones get none for a while. Pure: time and randomness are
//! arguments.
//!
//! A [`Group`] holds what is known about the endpoints of one frontend (a service's port, in one address family). The
//! proxy tells it what becomes of every pick, so each pick is followed by exactly one of these ends:
//!
//! - `handle_connected`, then `handle_first_byte` if a byte comes back, `handle_reset` if the endpoint resets, and in
//!   any case `handle_closed` at last;
//! - `handle_failed`, when the endpoint did not take the connection;
//! - `handle_cancelled`, when the caller gave up, or the attempt was cut, before the endpoint took it.

mod affinity;
mod algorithm;
mod budget;
mod candidates;
mod consistent;
mod ejection;
mod group;
mod hash;
mod health;
mod latency;
mod locality;
mod maglev;
mod member;
mod plan;
mod round_robin;
mod slow_start;
mod status;
#[cfg(test)]
mod tests;

pub use affinity::CALLERS_MAX;
pub use group::Group;
pub use health::Probes;
pub use member::EndpointId;
pub use status::{ConnectFailure, Counts, EjectionCause, EndpointStatus, Exhausted, Levels, Pick};
