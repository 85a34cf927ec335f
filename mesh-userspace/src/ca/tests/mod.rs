//! The authority from all sides: its files, its store, and over real sockets those who should and should not get
//! something from it.

mod files;
mod fuzz;
mod hostile;
mod nodes;
mod rotation;
mod tokens;
mod world;
