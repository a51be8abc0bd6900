//! `hallpass audit tail`: the audit log as it grows, a line an entry.

use std::{
    env,
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

use hallpass_client::v1::{AuditEntry, ChangeType, stream_audit_entries_request::Start};

use super::{
    Filter, change_name,
    follow::{Follow, Next, Sink, Taken},
    native, parse_time,
    resume::ResumeFile,
    source_name, values,
};
use crate::{cli::interrupted, config::ClientSettings};

/// Show every change as it is committed: what changed, from what to what, who changed it, from where
#[derive(Debug, clap::Args)]
pub(super) struct Tail {
    #[command(flatten)]
    filter: Filter,

    /// Print JSON objects, one a line
    #[arg(long)]
    json: bool,

    /// Begin with what was committed since then: 2026-05-01T09:30:00Z, or 24h ago
    #[arg(long, value_parser = parse_time, conflicts_with = "from_earliest")]
    since: Option<prost_types::Timestamp>,

    /// Begin with the earliest entry that is kept, not with the next
    #[arg(long)]
    from_earliest: bool,

    /// Go on from the cursor in this file where there is one, and keep the last one there
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,

    #[command(flatten)]
    client: ClientSettings,
}

impl Tail {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let interrupted = interrupted()?;
        let (resume, cursor) = match &self.resume {
            Some(path) => {
                let (file, cursor) = ResumeFile::open(path)?;
                (Some(file), cursor)
            }
            None => (None, None),
        };
        let start = match (cursor, self.since) {
            (Some(cursor), _) => Start::Cursor(cursor),
            (None, Some(since)) => Start::Since(since),
            (None, None) if self.from_earliest => Start::Earliest(true),
            (None, None) => Start::Now(true),
        };
        let mut printer = Printer {
            out: io::stdout(),
            json: self.json,
            colour: io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none(),
            resume,
        };
        let mut follow = Follow {
            client: &self.client,
            filter: self.filter.into(),
            start,
        };
        tokio::select! {
            followed = follow.run(&mut printer) => followed?,
            () = interrupted => {}
        }
        Ok(ExitCode::SUCCESS)
    }
}

struct Printer {
    out: io::Stdout,
    json: bool,
    colour: bool,
    resume: Option<ResumeFile>,
}

impl Sink for Printer {
    fn take(&mut self, taken: Taken<'_>) -> anyhow::Result<Next> {
        let mut text = String::new();
        let cursor = match taken {
            Taken::Entries(entries) => {
                for entry in entries {
                    text += &if self.json {
                        native::entry(entry)
                    } else {
                        line(entry, self.colour)
                    };
                    text.push('\n');
                }
                entries.last().map_or("", |entry| &entry.cursor)
            }
            Taken::Gap(gap) => {
                text = if self.json {
                    native::gap(gap)
                } else {
                    format!(
                        "-- entries were removed before they could be read: behind {}, up to {} --",
                        gap.from, gap.to
                    )
                };
                text.push('\n');
                &gap.to
            }
            Taken::Checkpoint(cursor) => cursor,
        };
        let printed = self
            .out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush());
        match printed {
            // Whoever has read enough of it, as `head` has, has been answered.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Next::Stop),
            printed => printed?,
        }
        if let Some(resume) = &mut self.resume {
            resume.keep(cursor)?;
        }
        Ok(Next::GoOn)
    }
}

/// ANSI's, by what happened to the row.
fn colour_of(entry: &AuditEntry) -> &'static str {
    match entry.change_type() {
        ChangeType::Insert => "\x1b[32m",
        ChangeType::Delete | ChangeType::Reset | ChangeType::Truncate | ChangeType::Unrecorded => {
            "\x1b[31m"
        }
        _ => "\x1b[33m",
    }
}

/// `2026-05-01T09:30:00.123456Z  UPDATE organization_permissions can_view_budget: is_enabled true -> false  …`
fn line(entry: &AuditEntry, colour: bool) -> String {
    let (on, dim, off) = if colour {
        (colour_of(entry), "\x1b[2m", "\x1b[0m")
    } else {
        ("", "", "")
    };
    let time = entry
        .commit_time
        .map_or(String::new(), |time| time.to_string());
    let mut line = format!(
        "{dim}{time}{off}  {on}{:<6}{off} {}",
        change_name(entry),
        entry.table
    );
    let said = [
        ("", &entry.permission),
        ("organization ", &entry.organization_id),
        ("user ", &entry.affected_user_id),
    ];
    for (name, value) in said.iter().filter(|(_, value)| !value.is_empty()) {
        // Writing to a string cannot fail.
        let _infallible = write!(line, " {name}{}", printable(value));
    }
    let (before, after) = values(entry);
    let changes: Vec<String> = (entry.changed_fields.iter())
        .filter(|field| !is_said(entry, field))
        .map(|field| match (before.get(field), after.get(field)) {
            (Some(before), Some(after)) => format!("{field} {before} -> {after}"),
            (None, Some(value)) | (Some(value), None) => format!("{field} {value}"),
            (None, None) => field.clone(),
        })
        .collect();
    if !changes.is_empty() {
        let _infallible = write!(line, ": {}", printable(&changes.join(", ")));
    }
    let actor = match (&*entry.actor_user_id, &*entry.actor_profile_id) {
        ("", "") => "by nobody named".to_owned(),
        ("", profile) => format!("by profile {profile}"),
        (user, _) => format!("by {user}"),
    };
    let _infallible = write!(line, "  {dim}{actor} ({})", source_name(entry));
    let login = if entry.database_login == entry.database_role {
        entry.database_role.clone()
    } else {
        format!("{} as {}", entry.database_login, entry.database_role)
    };
    let from = [
        ("from ", &entry.ip_address),
        ("with ", &entry.user_agent),
        ("request ", &entry.request_id),
        ("session ", &entry.session_id),
        ("login ", &login),
        ("at ", &entry.client_address),
        ("in ", &entry.application_name),
    ];
    for (name, value) in from.iter().filter(|(_, value)| !value.is_empty()) {
        let _infallible = write!(line, ", {name}{}", printable(value));
    }
    let _infallible = write!(line, "  {}{off}", entry.cursor);
    line
}

/// What the line says anyway, at its beginning.
fn is_said(entry: &AuditEntry, field: &str) -> bool {
    match field {
        "org_id" => !entry.organization_id.is_empty(),
        "permission_key" => !entry.permission.is_empty(),
        "user_id" => !entry.affected_user_id.is_empty(),
        _ => false,
    }
}

/// Without what would command the terminal: anybody can send a user agent.
fn printable(text: &str) -> String {
    let escape = |c: char| match c {
        c if c.is_control() => c.escape_unicode().to_string(),
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_who_changed_what_and_commands_no_terminal() {
        let entry = AuditEntry {
            cursor: "7-0000000a.1".to_owned(),
            organization_id: "o".to_owned(),
            permission: "can_view".to_owned(),
            table: "organization_permissions".to_owned(),
            change_type: ChangeType::Update.into(),
            before: r#"{"is_enabled": true, "org_id": "o"}"#.to_owned(),
            after: r#"{"is_enabled": false, "org_id": "o"}"#.to_owned(),
            changed_fields: vec!["is_enabled".to_owned()],
            actor_user_id: "ann".to_owned(),
            actor_source: 1,
            user_agent: "x\x1b[2J\ny".to_owned(),
            database_role: "app".to_owned(),
            database_login: "app".to_owned(),
            ..AuditEntry::default()
        };
        assert_eq!(
            line(&entry, false),
            "  UPDATE organization_permissions can_view organization o: is_enabled true -> false  by ann (SETTINGS), \
             with x\\u{1b}[2J\\u{a}y, login app  7-0000000a.1"
        );
        assert!(line(&entry, true).contains("\x1b[33mUPDATE\x1b[0m"));
    }
}
