//! Where lines of the log go. Those that follow each other within one turn of a thread may leave together: a write to a file
//! or a pipe costs as much as making the line.

use std::cell::RefCell;
use std::io::{self, Write};
use tracing_subscriber::fmt::MakeWriter;

/// Lines that gather before they leave anyway.
const MOST_BYTES: usize = 64 * 1024;

thread_local! {
    /// What waits, while the thread gathers.
    static GATHERED: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Whole lines for an output, each as it is written, or those of a [`gathered`] turn together.
#[derive(Clone, Debug)]
pub(super) struct Lines<O>(pub(super) O);

/// Does `work`; what this thread logs meanwhile leaves at its end, in order. Not to be nested, and not for work that lasts:
/// if the process is killed within, its lines are lost.
pub fn gathered<R>(work: impl FnOnce() -> R) -> R {
    gathered_to(io::stderr(), work)
}

fn gathered_to<R>(output: impl Write, work: impl FnOnce() -> R) -> R {
    GATHERED.set(Some(Vec::new()));
    let _leaving = Leaving(output);
    work()
}

/// Lets go of what was gathered, also when the work panics.
struct Leaving<O: Write>(O);

impl<O: Write> Drop for Leaving<O> {
    fn drop(&mut self) {
        let lines = GATHERED.take().unwrap_or_default();
        if !lines.is_empty() {
            // As without gathering: nobody is left to be told that the log cannot be written.
            let _ = self.0.write_all(&lines);
        }
    }
}

impl<O: Write> Write for Lines<O> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        GATHERED.with_borrow_mut(|gathered| match gathered {
            None => self.0.write(line),
            Some(lines) => {
                lines.extend_from_slice(line);
                if lines.len() >= MOST_BYTES {
                    // Gone also if it fails: what was written of it would be written twice.
                    self.0.write_all(&std::mem::take(lines))?;
                }
                Ok(line.len())
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<'a, O: MakeWriter<'a>> MakeWriter<'a> for Lines<O> {
    type Writer = Lines<O::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Lines(self.0.make_writer())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// What reached the output, by write.
    #[derive(Default)]
    struct Writes(Vec<String>);

    impl Write for &mut Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.push(String::from_utf8(bytes.to_vec()).unwrap());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_leave_at_once_or_together_at_the_end_of_a_turn() {
        let (mut direct, mut together) = (Writes::default(), Writes::default());
        let mut lines = Lines(&mut direct);
        lines.write_all(b"one\n").unwrap();
        gathered_to(&mut together, || {
            lines.write_all(b"two\n").unwrap();
            lines.write_all(b"three\n").unwrap();
        });
        lines.write_all(b"four\n").unwrap();
        assert_eq!(direct.0, ["one\n", "four\n"]);
        assert_eq!(together.0, ["two\nthree\n"]);
    }

    #[test]
    fn what_is_gathered_is_bounded_and_survives_a_panic() {
        let (mut early, mut late) = (Writes::default(), Writes::default());
        let line = "x".repeat(MOST_BYTES / 2);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            gathered_to(&mut late, || {
                let mut lines = Lines(&mut early);
                (0..3).for_each(|_| lines.write_all(line.as_bytes()).unwrap());
                panic!("in the middle of it");
            });
        }));
        assert!(panic.is_err());
        assert_eq!(early.0, [line.repeat(2)]);
        assert_eq!(late.0, [line]);
    }

    #[test]
    fn nothing_said_is_nothing_written() {
        let mut output = Writes::default();
        assert_eq!(gathered_to(&mut output, || 5), 5);
        assert!(output.0.is_empty());
    }
}
