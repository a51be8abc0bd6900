//! `hallpass doctor`: says how a database stands, and of whatever is wrong what mends it. Exits with 0 when hallpass works
//! on it, 1 when something failed, 2 when it could not look.
//!
//! Invariant: it changes nothing.

use std::process::ExitCode;

use anyhow::{Context, anyhow};
use serde_json::json;

use super::{answer, database::Database};
use crate::{
    config::{DatabaseSettings, Secret},
    store::{
        DatabaseUrl,
        doctor::{Finding, Problem, examine},
    },
};

/// Columns of the longest status and the longest subject.
const STATUS_WIDTH: usize = 7;
const SUBJECT_WIDTH: usize = 12;

/// What to try when there is no connection.
const UNREACHABLE: &str = "cannot look: see that the server runs, that the URL names its host, port, database and login, and \
     that pg_hba.conf lets the login in (`psql URL` says the same in its words)";

/// Look at the database: exits with 0 when hallpass works on it, 1 when something is wrong, 2 when it cannot look
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    database: DatabaseSettings,

    /// Also look whether the feed's way leads to the same log, and hears of changes
    #[arg(
        long,
        env = "HALLPASS_FEED_DATABASE_URL",
        hide_env_values = true,
        requires = "database_url"
    )]
    feed_database_url: Option<Secret>,

    /// Print a line of JSON for each finding
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let database = Database::open(&self.database).await?;
        let feed: Option<DatabaseUrl> = (self.feed_database_url)
            .map(|url| url.0.parse())
            .transpose()
            .map_err(|error| anyhow!("--feed-database-url: {error}"))?;
        let findings = examine(&database.url, feed.as_ref())
            .await
            .context(UNREACHABLE)?;
        database.close().await?;
        let lines: String = if self.json {
            findings.iter().map(as_json).collect()
        } else {
            findings.iter().map(as_text).collect()
        };
        answer(&lines)?;
        let mut problems = findings.iter().flat_map(|f| &f.problems);
        Ok(if problems.any(|p| p.is_failure) {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

fn status(problem: &Problem) -> &'static str {
    if problem.is_failure {
        "FAILED"
    } else {
        "warning"
    }
}

fn as_text(finding: &Finding) -> String {
    let line = |status, what: &str| {
        let what = what.replace(char::is_control, " ");
        let subject = finding.subject;
        format!("{status:STATUS_WIDTH$} {subject:SUBJECT_WIDTH$} {what}\n")
    };
    if finding.problems.is_empty() {
        return line("ok", &finding.well);
    }
    let problems = finding.problems.iter().map(|problem| {
        let steps = problem.remedy.iter();
        let steps =
            steps.map(|step| format!("        → {}\n", step.replace(char::is_control, " ")));
        line(status(problem), &problem.what) + &steps.collect::<String>()
    });
    problems.collect()
}

fn as_json(finding: &Finding) -> String {
    let subject = finding.subject;
    if finding.problems.is_empty() {
        let line = json!({ "status": "ok", "subject": subject, "message": finding.well });
        return format!("{line}\n");
    }
    let problems = finding.problems.iter().map(|problem| {
        let line = json!({
            "status": status(problem).to_lowercase(), "subject": subject, "message": problem.what, "remedy": problem.remedy
        });
        format!("{line}\n")
    });
    problems.collect()
}
