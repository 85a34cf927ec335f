//! Instructions of what runs often. By itself this prints the names of the subjects, in the order in which it runs them
//! once each; `cargo xtask instructions` runs it in valgrind, which counts inside of [`measured`] alone and writes down what
//! it has counted whenever [`written_down`] ends.

mod subjects;

use std::hint::black_box;

fn main() {
    for mut subject in subjects::all() {
        // Once uncounted: what is made on first use (tables, buffers, parts of the runtime) is there afterwards.
        (subject.run)();
        println!("{}", subject.name);
        written_down(&mut subject.run);
    }
}

/// Not the same function as [`measured`]: valgrind does only one thing with each.
#[inline(never)]
fn written_down(run: &mut dyn FnMut()) {
    measured(black_box(run));
    // Something remains to be done after the call, or it would be a jump and this function gone while it runs.
    black_box(());
}

#[inline(never)]
fn measured(run: &mut dyn FnMut()) {
    black_box(run)();
    black_box(());
}
