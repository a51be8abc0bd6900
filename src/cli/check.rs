//! `hallpass check`: asks a running service one question. Exits with 0 for allow, 1 for deny, 2 for an error.

use std::process::ExitCode;

use hallpass_client::v1::{
    CheckPermissionRequest, CheckPermissionResponse, Consistency, Evidence, Explanation,
    MinRoleSource, Source, consistency::Requirement,
};

use super::list::{connect, explain_status};
use crate::config::ClientSettings;

/// Ask whether a user may do something: exits with 0 for allow, 1 for deny, 2 for an error
#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The organization's UUID
    organization: String,

    /// The user's UUID
    user: String,

    /// The permission's key, for example can_approve_expenses
    permission: String,

    /// Show the facts behind the decision
    #[arg(long)]
    explain: bool,

    /// Ask the database, from a snapshot that begins after this call
    #[arg(long)]
    fully_consistent: bool,

    #[command(flatten)]
    client: ClientSettings,
}

impl Check {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let request = CheckPermissionRequest {
            organization_id: self.organization,
            user_id: self.user,
            permission: self.permission,
            explain: self.explain,
            consistency: self.fully_consistent.then_some(Consistency {
                requirement: Some(Requirement::FullyConsistent(true)),
            }),
        };
        let answer = connect(&self.client)
            .await?
            .check_permission(request)
            .await
            .map_err(explain_status)?
            .into_inner();
        print(&answer);
        Ok(if answer.allowed {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn print(answer: &CheckPermissionResponse) {
    println!(
        "{}  {}",
        if answer.allowed { "allow" } else { "deny " },
        reason_name(answer.reason().as_str_name())
    );
    if let Some(explanation) = &answer.explanation {
        print_explanation(explanation);
    }
    if let Some(evidence) = &answer.evidence {
        println!("{}", describe(evidence));
    }
}

fn print_explanation(explanation: &Explanation) {
    let source = match explanation.min_role_source() {
        MinRoleSource::Unspecified => "",
        MinRoleSource::Template => " (the template's)",
        MinRoleSource::Override => " (the organization's own)",
    };
    let rank = explanation
        .role_rank
        .map_or(" (not on the ladder)".to_owned(), |rank| {
            format!(" (rank {rank})")
        });
    if explanation.role.is_empty() {
        println!("  role           none");
    } else {
        println!("  role           {}{rank}", explanation.role);
    }
    println!(
        "  minimum role   {}{source}",
        explanation.effective_min_role
    );
    println!(
        "  enabled        {}",
        if explanation.enabled { "yes" } else { "no" }
    );
    println!(
        "  by name        {}",
        if explanation.specific_user {
            "yes"
        } else {
            "no"
        }
    );
}

/// The name of an enum value without the prefix that protobuf wants.
pub(super) fn reason_name(name: &str) -> &str {
    name.strip_prefix("REASON_").unwrap_or(name)
}

/// One line that says how fresh an answer is.
pub(super) fn describe(evidence: &Evidence) -> String {
    let source = match evidence.source() {
        Source::Cache => "cache",
        Source::Database => "database",
        Source::Unspecified => "unknown source",
    };
    let staleness = evidence.staleness.unwrap_or_default();
    let millis = staleness.seconds * 1_000 + i64::from(staleness.nanos) / 1_000_000;
    format!(
        "from the {source} at position {}, {millis} ms stale at most",
        evidence.position
    )
}
