//! Both transports over loopback sockets, with real certificates.

mod behaviour;
mod fuzz;
mod hostile;
mod moves;
mod pool;
mod renewal;
mod world;
