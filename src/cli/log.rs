//! The log, on standard error: standard output belongs to what a command answers.
//!
//! Invariant: an event is one line, whatever it is about, and moves no terminal's cursor. tracing-subscriber escapes
//! its messages and not the values of fields, so [`OneLine`] escapes all; hence there is no colour.

use std::io::{self, Write};

use tracing_subscriber::EnvFilter;

/// Starts the log; `RUST_LOG` says how much of it.
pub(super) fn start() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| OneLine(io::stderr()))
        .with_ansi(false)
        .with_target(false)
        .init();
}

/// Writes events, each handed over whole, on one line each.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let mut line = String::with_capacity(event.len());
        for c in text.chars() {
            if c.is_control() {
                line.extend(c.escape_default());
            } else {
                line.push(c);
            }
        }
        line.push('\n');
        self.0.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
