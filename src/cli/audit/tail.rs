//! `hallpass audit tail`: the audit log as it grows, a line an entry.

use std::{
    collections::HashSet,
    env,
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

use hallpass_client::v1::{AuditEntry, ChangeType, stream_audit_entries_request::Start};
use serde_json::Value;

use super::{
    Filter, change_name,
    follow::{Follow, Next, Sink, Taken},
    native, parse_time,
    resume::ResumeFile,
    source_name, values,
};
use crate::{cli::interrupted, config::ClientSettings};

/// The table of the role ladder.
const ROLES: &str = "permission_roles";

/// Elements of a list that a line names as won or lost; it counts the others. A setting may name thousands of users.
const LISTED_MAX: usize = 10;

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

/// `2026-05-01T09:30:00.123456Z  UPDATE organization_permissions can_view_budget …: is_enabled true -> false  by …`
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
    let (before, after) = values(entry);
    let said = [
        ("", role_of(entry, &before, &after)),
        ("", &*entry.permission),
        ("organization ", &entry.organization_id),
        ("user ", &entry.affected_user_id),
    ];
    for (name, value) in said.iter().filter(|(_, value)| !value.is_empty()) {
        // Writing to a string cannot fail.
        let _infallible = write!(line, " {name}{}", printable(value));
    }
    let changes: Vec<String> = match entry.change_type() {
        ChangeType::Truncate => vec!["every row".to_owned()],
        ChangeType::Unrecorded => vec!["changes went past the record".to_owned()],
        _ => (entry.changed_fields.iter())
            .filter(|field| !is_said(entry, field))
            .map(|field| format!("{field} {}", change(before.get(field), after.get(field))))
            .collect(),
    };
    if !changes.is_empty() {
        let _infallible = write!(line, ": {}", printable(&changes.join(", ")));
    }
    let source = source_name(entry);
    let actor = match (&*entry.actor_user_id, &*entry.actor_profile_id) {
        // Whoever inspects the record has found them, and has not made them.
        ("", "") if entry.change_type() == ChangeType::Unrecorded => "found".to_owned(),
        ("", "") => "by an actor that was not named".to_owned(),
        ("", profile) => format!("by profile {profile} ({source})"),
        (user, _) => format!("by {user} ({source})"),
    };
    let _infallible = write!(line, "  {dim}{actor}");
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

/// The role whose row of the ladder changed: it is known by nothing else.
fn role_of<'a>(entry: &AuditEntry, before: &'a Value, after: &'a Value) -> &'a str {
    let key = |row: &'a Value| row.get("role_key")?.as_str();
    match &*entry.table {
        ROLES => key(after).or_else(|| key(before)).unwrap_or_default(),
        _ => "",
    }
}

/// From what to what a column changed, `volunteer -> admin`; what a row came or went with; what a list won and lost.
fn change(before: Option<&Value>, after: Option<&Value>) -> String {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned();
    match (list(before), list(after)) {
        (None, None) => (before.into_iter().chain(after).map(shown))
            .collect::<Vec<String>>()
            .join(" -> "),
        (before, after) => difference(&before.unwrap_or_default(), &after.unwrap_or_default()),
    }
}

/// `+won -lost`
fn difference(before: &[Value], after: &[Value]) -> String {
    let (old, new): (HashSet<_>, HashSet<_>) = (before.iter().collect(), after.iter().collect());
    let won = after.iter().filter(|value| !old.contains(value));
    let lost = before.iter().filter(|value| !new.contains(value));
    let differences: Vec<String> = (won.map(|value| format!("+{}", shown(value))))
        .chain(lost.map(|value| format!("-{}", shown(value))))
        .collect();
    match differences.len() {
        0 => "has the same elements".to_owned(),
        count if count > LISTED_MAX => {
            let named = differences[..LISTED_MAX].join(" ");
            format!("{named} and {} more", count - LISTED_MAX)
        }
        _ => differences.join(" "),
    }
}

/// As JSON; a text that nothing else in a line can be taken for goes without its quotes.
fn shown(value: &Value) -> String {
    let is_plain = |text: &str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        !text.is_empty()
            && text.chars().all(is_plain)
            && serde_json::from_str::<Value>(text).is_err()
    };
    match value {
        Value::String(text) if is_plain(text) => text.clone(),
        value => value.to_string(),
    }
}

/// What the line says anyway, at its beginning.
fn is_said(entry: &AuditEntry, field: &str) -> bool {
    match field {
        "role_key" => entry.table == ROLES,
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
    fn a_value_is_shown_as_what_it_is_and_a_list_as_what_it_won_and_lost() {
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        for (before, after, expected) in [
            (r#""volunteer""#, r#""admin""#, "volunteer -> admin"),
            ("null", r#""null""#, r#"null -> "null""#),
            (r#""""#, r#""a b""#, "\"\" -> \"a b\""),
            (r#""7""#, "7", r#""7" -> 7"#),
            (r#"["a","b"]"#, r#"["b","c"]"#, "+c -a"),
            ("null", r#"["a"]"#, "+a"),
            (r#"["a","b"]"#, r#"["b","a"]"#, "has the same elements"),
        ] {
            assert_eq!(change(Some(&json(before)), Some(&json(after))), expected);
        }
        assert_eq!(change(None, Some(&json("true"))), "true");
        assert_eq!(change(Some(&json(r#"["a"]"#)), None), "-a");
        let many: Vec<Value> = (0..50_000).map(|n| format!("u{n}").into()).collect();
        let won = change(None, Some(&many.into()));
        assert!(won.starts_with("+u0 +u1 "), "{won}");
        assert!(won.ends_with(" +u9 and 49990 more"), "{won}");
    }

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
