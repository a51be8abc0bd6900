//! The log, on standard error: standard output belongs to what a command answers.
//!
//! Invariant: an event is one line, whatever it is about, and moves no terminal's cursor. tracing-subscriber escapes
//! its messages and not the values of fields, so [`OneLine`] escapes all; hence there is no colour.

use std::{
    env,
    io::{self, Write},
    sync::OnceLock,
};

use clap::ValueEnum;
use tracing_subscriber::{
    EnvFilter, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

/// What is worth a look in the morning.
const DEFAULT_LOG_LEVEL: &str = "info";

/// What is logged, and how.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct LogSettings {
    /// How much is logged: error, warn, info, debug or trace; of one part with hallpass::PART=LEVEL, separated by commas
    #[arg(long, env = "HALLPASS_LOG_LEVEL", default_value_t = default_level(), value_parser = parse_level, global = true)]
    log_level: String,

    /// How: lines for people, or objects for programs
    #[arg(
        long,
        env = "HALLPASS_LOG_FORMAT",
        default_value = "pretty",
        global = true
    )]
    log_format: LogFormat,
}

impl LogSettings {
    pub(super) fn level(&self) -> &str {
        &self.log_level
    }
}

/// What Rust's programs have by custom, else ours.
fn default_level() -> String {
    let custom = env::var(EnvFilter::DEFAULT_ENV).ok();
    custom
        .filter(|level| !level.is_empty() && parse_level(level).is_ok())
        .unwrap_or_else(|| DEFAULT_LOG_LEVEL.to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// A line for people.
    Pretty,
    /// An object of JSON a line.
    Json,
}

fn parse_level(text: &str) -> Result<String, String> {
    let filter = EnvFilter::builder().parse(text);
    filter.map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// The filter in use, to be replaced while the program runs.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts the log, once.
pub(super) fn start(settings: &LogSettings) {
    let (filter, handle) = reload::Layer::new(EnvFilter::new(&settings.log_level));
    let registry = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer().with_ansi(false).with_target(false);
    match settings.log_format {
        LogFormat::Pretty => registry
            .with(lines.with_writer(|| OneLine::of_text(io::stderr())))
            .init(),
        LogFormat::Json => registry
            .with(
                lines
                    .json()
                    .flatten_event(true)
                    .with_writer(|| OneLine::of_json(io::stderr())),
            )
            .init(),
    }
    // Nobody else starts one.
    let _ = FILTER.set(handle);
}

/// Logs so much from now on.
pub(super) fn set_level(level: &str) {
    if let Some(filter) = FILTER.get() {
        // It is there as long as the program.
        let _ = filter.reload(EnvFilter::new(level));
    }
}

/// Writes events, each handed over whole, on one line each.
struct OneLine<W> {
    inner: W,
    escape: fn(char, &mut String),
}

impl<W> OneLine<W> {
    fn of_text(inner: W) -> Self {
        let escape = |c: char, line: &mut String| line.extend(c.escape_default());
        Self { inner, escape }
    }

    /// What JSON lets stand as it is, too.
    fn of_json(inner: W) -> Self {
        let escape =
            |c: char, line: &mut String| line.push_str(&format!("\\u{:04x}", u32::from(c)));
        Self { inner, escape }
    }
}

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let mut line = String::with_capacity(event.len());
        for c in text.chars() {
            if c.is_control() {
                (self.escape)(c, &mut line);
            } else {
                line.push(c);
            }
        }
        line.push('\n');
        self.inner.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
