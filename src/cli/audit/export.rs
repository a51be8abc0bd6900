//! `hallpass audit export`: what the audit log has up to now, one JSON object a line.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, IsTerminal, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use hallpass_client::v1::{AuditEntry, stream_audit_entries_request::Start};
use serde_json::Value;

use super::{
    Filter,
    follow::{Follow, Next, Sink, Taken},
    native, ocsf, parse_time,
    resume::ResumeFile,
};
use crate::{cli::interrupted, config::ClientSettings, model::Cursor};

/// How often a terminal is told how far the export is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Write the audit log up to now as JSON objects, one a line
#[derive(Debug, clap::Args)]
pub(super) struct Export {
    #[command(flatten)]
    filter: Filter,

    /// What the objects are: the log's own entries, or OCSF events of the classes 3004, 3005 and 3006
    #[arg(long, value_enum, default_value = "native")]
    format: Format,

    /// Begin with what was committed since then: 2026-05-01T09:30:00Z, or 24h ago; else with the earliest that is kept
    #[arg(long, value_parser = parse_time)]
    since: Option<prost_types::Timestamp>,

    /// Write here instead of to standard output; an export that is there already is gone on with, behind its last line
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Go on from the cursor in this file where there is one, and keep the last one there
    #[arg(long, value_name = "FILE", conflicts_with = "output")]
    resume: Option<PathBuf>,

    #[command(flatten)]
    client: ClientSettings,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Native,
    Ocsf,
}

impl Export {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let interrupted = interrupted()?;
        let (mut resume, mut cursor) = (None, None);
        if let Some(path) = &self.resume {
            let (file, kept) = ResumeFile::open(path)?;
            (resume, cursor) = (Some(file), kept);
        }
        let out: Box<dyn Write> = match &self.output {
            None => Box::new(io::stdout().lock()),
            Some(path) => {
                let (file, last) = continue_file(path)
                    .with_context(|| format!("cannot go on with {}", path.display()))?;
                cursor = last;
                Box::new(file)
            }
        };
        let start = match (cursor, self.since) {
            (Some(cursor), _) => Start::Cursor(cursor),
            (None, Some(since)) => Start::Since(since),
            (None, None) => Start::Earliest(true),
        };
        let export = async {
            let mut end = FindEnd(None);
            let mut follow = Follow {
                client: &self.client,
                filter: self.filter.clone().into(),
                start: Start::Now(true),
            };
            follow.run(&mut end).await?;
            let mut writer = Writer {
                out: BufWriter::new(out),
                format: self.format,
                resume,
                end: end
                    .0
                    .context("the service did not say where its log ends")?,
                entries: 0,
                said: io::stderr().is_terminal().then(Instant::now),
            };
            follow.start = start;
            follow.run(&mut writer).await?;
            anyhow::Ok(writer.entries)
        };
        tokio::select! {
            entries = export => {
                tracing::info!(entries = entries?, "exported the audit log");
                Ok(ExitCode::SUCCESS)
            }
            // What was not written is there for the next.
            () = interrupted => Ok(ExitCode::FAILURE),
        }
    }
}

/// Where the log ends when the export begins.
struct FindEnd(Option<Cursor>);

impl Sink for FindEnd {
    fn take(&mut self, taken: Taken<'_>) -> anyhow::Result<Next> {
        let Taken::Checkpoint(cursor) = taken else {
            return Ok(Next::GoOn);
        };
        self.0 = Some(cursor.parse().context("a cursor of a newer service")?);
        Ok(Next::Stop)
    }
}

struct Writer<W: Write> {
    out: BufWriter<W>,
    format: Format,
    resume: Option<ResumeFile>,
    end: Cursor,
    entries: u64,
    /// `None`: nobody watches.
    said: Option<Instant>,
}

impl<W: Write> Writer<W> {
    fn write(&mut self, entry: &AuditEntry) -> io::Result<()> {
        let line = match self.format {
            Format::Native => native::entry(entry),
            Format::Ocsf => ocsf::event(entry),
        };
        self.entries += 1;
        writeln!(self.out, "{line}")
    }
}

impl<W: Write> Sink for Writer<W> {
    fn take(&mut self, taken: Taken<'_>) -> anyhow::Result<Next> {
        let cursor = match taken {
            Taken::Entries(entries) => {
                let mut last = None;
                for entry in entries {
                    let cursor: Cursor = entry
                        .cursor
                        .parse()
                        .context("a cursor of a newer service")?;
                    if self.end.is_before(cursor) {
                        break;
                    }
                    self.write(entry)?;
                    last = Some((cursor, &*entry.cursor));
                }
                last.unwrap_or((self.end, ""))
            }
            Taken::Gap(gap) => {
                tracing::warn!(
                    from = gap.from,
                    to = gap.to,
                    "entries were removed before they could be exported"
                );
                if matches!(self.format, Format::Native) {
                    writeln!(self.out, "{}", native::gap(gap))?;
                }
                (gap.to.parse()?, &*gap.to)
            }
            Taken::Checkpoint(cursor) => (cursor.parse()?, cursor),
        };
        self.out.flush()?;
        let (reached, text) = cursor;
        if let Some(resume) = self.resume.as_mut().filter(|_| !text.is_empty()) {
            resume.keep(text)?;
        }
        if self
            .said
            .is_some_and(|said| said.elapsed() >= PROGRESS_INTERVAL)
        {
            self.said = Some(Instant::now());
            eprintln!("{} entries, at {reached} of {}", self.entries, self.end);
        }
        Ok(if reached.is_before(self.end) {
            Next::GoOn
        } else {
            Next::Stop
        })
    }
}

/// Opens an export to go on with: cuts a line off that was not written whole, and says the last one's cursor.
fn continue_file(path: &Path) -> anyhow::Result<(File, Option<String>)> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    let Some((begin, end)) = last_line(&mut file)? else {
        file.set_len(0)?;
        return Ok((file, None));
    };
    file.seek(SeekFrom::Start(begin))?;
    let mut line = Vec::new();
    (&mut file).take(end - begin).read_to_end(&mut line)?;
    let line: Option<Value> = serde_json::from_slice(&line).ok();
    let cursor = line.as_ref().and_then(|line| {
        let cursor = line
            .get("cursor")
            .or_else(|| line.get("unmapped")?.get("cursor"));
        cursor?.as_str().map(str::to_owned)
    });
    ensure!(cursor.is_some(), "its last line is none of an export");
    file.set_len(end)?;
    file.seek(SeekFrom::End(0))?;
    Ok((file, cursor))
}

/// Where the last whole line begins, and ends with its newline. `None` when there is none.
fn last_line(file: &mut File) -> io::Result<Option<(u64, u64)>> {
    let mut reader = BufReader::new(file);
    let (mut begin, mut end, mut last) = (0, 0, None);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if line.ends_with(b"\n") {
            end += u64::try_from(line.len()).unwrap_or(0);
            last = Some((begin, end));
            begin = end;
        }
        line.clear();
    }
    Ok(last)
}
