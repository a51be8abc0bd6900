//! A changed override in an organization whose members are all cached: how long until an answer has it.

use std::time::Instant;

use hallpass_client::{
    tonic::transport::Channel,
    v1::{
        CheckPermissionRequest, Consistency, Reason, Source, consistency::Requirement,
        permission_service_client::PermissionServiceClient,
    },
};
use hdrhistogram::Histogram;
use tokio_postgres::Client;

use crate::{
    Result,
    members::{FIRST_ORGANIZATION, Member},
    report::{Report, Unit},
    service::{ENDPOINT, Service, question},
};

const CHANGES: usize = 20;

const PERMISSION: &str = "can_view_messages";

const SET_ENABLED: &str = "
INSERT INTO organization_permissions (org_id, permission_key, is_enabled) VALUES ($1, $2, $3)
ON CONFLICT (org_id, permission_key) DO UPDATE SET is_enabled = $3";

const SEEN_MS_MAX: f64 = 250.0;

pub(crate) async fn run(
    report: &mut Report,
    url: &str,
    database: &Client,
    members: &[Member],
) -> Result<()> {
    let mut section = report.section(
        "an override changes in an organization of 100,000 cached members",
        &["from the return of the COMMIT until a check has it, that check included"],
    );
    set_enabled(database, true).await?;
    // Room for this organization's members alone, which come first.
    let service = Service::start(url, members.len()).await?;
    let mut checks = PermissionServiceClient::new(hallpass_client::connect(ENDPOINT).await?);
    let mut polled = Histogram::<u64>::new(3)?;
    let mut waited = Histogram::<u64>::new(3)?;
    let mut enabled = true;
    for change in 0..CHANGES * 2 {
        enabled = !enabled;
        // Each about another member, who is cached: or nothing would have to be made invalid.
        let member = members[(change + 1) * members.len() / (CHANGES * 2 + 1)];
        let before = ask(&mut checks, question(member, PERMISSION)).await?;
        if before.1 == enabled || change == 0 && before.0 != Some(Source::Cache) {
            return Err("a member of a warm cache was not cached".into());
        }
        set_enabled(database, enabled).await?;
        let committed = Instant::now();
        let histogram = if change % 2 == 0 {
            while ask(&mut checks, question(member, PERMISSION)).await?.1 != enabled {}
            &mut polled
        } else {
            let head = database.query_one("SELECT hallpass.head()", &[]).await?;
            let requirement = Some(Requirement::AtLeastAsFresh(head.get(0)));
            let question = CheckPermissionRequest {
                consistency: Some(Consistency { requirement }),
                ..question(member, PERMISSION)
            };
            if ask(&mut checks, question).await?.1 != enabled {
                return Err("an answer is older than it was asked to be".into());
            }
            &mut waited
        };
        histogram.record(u64::try_from(committed.elapsed().as_micros())?)?;
    }
    drop(service);
    for (how, histogram) in [
        ("asked again and again", &polled),
        ("asked once, at_least_as_fresh", &waited),
    ] {
        let p50 = histogram.value_at_quantile(0.5) as f64 / 1e3;
        let max = histogram.max() as f64 / 1e3;
        section.tell(&format!("{how}, p50 of {CHANGES}"), p50, Unit::Milliseconds);
        section.ask(
            &format!("{how}, the longest"),
            max,
            Unit::Milliseconds,
            SEEN_MS_MAX,
        );
    }
    Ok(())
}

async fn set_enabled(database: &Client, enabled: bool) -> Result<()> {
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
        [&FIRST_ORGANIZATION.0, &PERMISSION, &enabled];
    database.execute(SET_ENABLED, &parameters).await?;
    Ok(())
}

/// Where the answer comes from, and whether the permission is enabled.
async fn ask(
    checks: &mut PermissionServiceClient<Channel>,
    question: CheckPermissionRequest,
) -> Result<(Option<Source>, bool)> {
    let answer = checks.check_permission(question).await?.into_inner();
    let enabled = answer.reason() != Reason::PermissionDisabled;
    Ok((answer.evidence.map(|evidence| evidence.source()), enabled))
}
