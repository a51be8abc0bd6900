//! `hallpass audit`: follows the audit log, and exports it. Neither loses an entry or repeats one: each goes on from
//! the cursor of what it has written.

mod export;
mod follow;
mod native;
mod ocsf;
mod resume;
mod tail;

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use hallpass_client::v1;

/// Read the audit log
#[derive(Debug, clap::Args)]
pub(super) struct Audit {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Tail(tail::Tail),
    Export(export::Export),
}

impl Audit {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Tail(command) => command.run().await,
            Command::Export(command) => command.run().await,
        }
    }
}

/// Which entries.
#[derive(Clone, Debug, clap::Args)]
struct Filter {
    /// Only entries of this organization, by its UUID
    #[arg(long, default_value = "", hide_default_value = true)]
    organization: String,

    /// Only changes of this user's membership
    #[arg(long, default_value = "", hide_default_value = true)]
    affected_user: String,

    /// Only changes that this user made
    #[arg(long, default_value = "", hide_default_value = true)]
    actor: String,

    /// Only changes of this permission
    #[arg(long, default_value = "", hide_default_value = true)]
    permission: String,

    /// Only changes of this table, for example profiles
    #[arg(long, default_value = "", hide_default_value = true)]
    table: String,

    /// Only changes of this kind: insert, update, delete, truncate, unrecorded
    #[arg(long, value_parser = parse_change_type)]
    change_type: Option<v1::ChangeType>,
}

impl From<Filter> for v1::AuditFilter {
    fn from(filter: Filter) -> Self {
        Self {
            organization_id: filter.organization,
            affected_user_id: filter.affected_user,
            actor_user_id: filter.actor,
            permission: filter.permission,
            table: filter.table,
            change_type: filter.change_type.unwrap_or_default().into(),
        }
    }
}

fn parse_change_type(name: &str) -> Result<v1::ChangeType, String> {
    let name = format!("CHANGE_TYPE_{}", name.to_ascii_uppercase());
    v1::ChangeType::from_str_name(&name)
        .filter(|known| *known != v1::ChangeType::Unspecified)
        .ok_or_else(|| "not insert, update, delete, truncate or unrecorded".to_owned())
}

/// `2026-05-01T09:30:00Z`, `2026-05-01`, or how long ago: `90s`, `15m`, `24h`, `7d`.
fn parse_time(text: &str) -> Result<prost_types::Timestamp, String> {
    let units = [("s", 1), ("m", 60), ("h", 60 * 60), ("d", 24 * 60 * 60)];
    for (unit, seconds) in units {
        let count = text
            .strip_suffix(unit)
            .and_then(|count| count.parse::<u32>().ok());
        if let Some(count) = count {
            let ago = Duration::from_secs(u64::from(count) * seconds);
            let time = ago_from_now(ago);
            return time
                .map(Into::into)
                .ok_or_else(|| "too long ago".to_owned());
        }
    }
    let whole = if text.contains('T') {
        text.to_owned()
    } else {
        format!("{text}T00:00:00Z")
    };
    whole.parse().map_err(|_| {
        "not a time such as 2026-05-01T09:30:00Z, nor how long ago, such as 24h".to_owned()
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "whoever says how long ago goes by the clock of the machine that it is said on"
)]
fn ago_from_now(ago: Duration) -> Option<SystemTime> {
    SystemTime::now().checked_sub(ago)
}

/// The name of an enum value without the prefix that protobuf wants.
fn change_name(entry: &v1::AuditEntry) -> &'static str {
    entry
        .change_type()
        .as_str_name()
        .trim_start_matches("CHANGE_TYPE_")
}

fn source_name(entry: &v1::AuditEntry) -> &'static str {
    entry
        .actor_source()
        .as_str_name()
        .trim_start_matches("ACTOR_SOURCE_")
}

/// The row before and after.
fn values(entry: &v1::AuditEntry) -> (serde_json::Value, serde_json::Value) {
    let parse = |json: &str| match json {
        "" => serde_json::Value::Null,
        // What is no JSON would be a defect of the server's: shown as it is.
        json => serde_json::from_str(json).unwrap_or_else(|_| json.into()),
    };
    (parse(&entry.before), parse(&entry.after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_points_or_how_long_ago() {
        for (text, seconds) in [
            ("2026-05-01T09:30:00Z", Some(1_777_627_800)),
            ("2026-05-01T11:30:00+02:00", Some(1_777_627_800)),
            ("2026-05-01", Some(1_777_593_600)),
            ("yesterday", None),
            ("", None),
            ("-5m", None),
        ] {
            assert_eq!(
                parse_time(text).ok().map(|time| time.seconds),
                seconds,
                "{text}"
            );
        }
        let hour = parse_time("1h").unwrap().seconds - parse_time("2h").unwrap().seconds;
        assert!((3_599..=3_601).contains(&hour));
    }
}
