//! A refresh of both materialized views after one member has changed, and a start that fills the cache from them.

use std::time::Instant;

use hallpass::embedded::PrivatePostgres;
use tokio_postgres::Client;

use crate::{
    Result,
    members::{self, Size},
    report::{Report, Unit},
    service::{Service, warm_start},
};

/// Once before the first refresh that is measured, which otherwise puts in every row.
const FILL: &str = "
REFRESH MATERIALIZED VIEW user_permission_matrix;
REFRESH MATERIALIZED VIEW org_permission_summary;
VACUUM ANALYZE user_permission_matrix";

const CHANGE: &str = "
UPDATE profiles SET role = CASE role WHEN 'admin' THEN 'teacher' ELSE 'admin' END
WHERE id = (SELECT id FROM profiles ORDER BY id LIMIT 1)";

const REFRESH: &str = "SELECT refresh_permission_materialized_views()";

/// Rows of the matrix that are not what the view says: none, or nothing was measured.
const DIFFERENCES: &str = "
SELECT count(*) FROM user_permission_matrix m
JOIN effective_user_permissions e USING (org_id, user_id, permission_key)
WHERE m.reason <> e.reason AND e.user_id = (SELECT user_id FROM profiles ORDER BY id LIMIT 1)";

const STARTS: usize = 3;

const WARM_START_S_MAX: f64 = 1.0;

/// Name, size, refreshes, and what one may take, in seconds.
const DATABASES: [(&str, Size, usize, f64); 2] = [
    (
        "ten_thousand",
        Size {
            first_organization: 200,
            other_organizations: 49,
            of_each_other: 200,
        },
        5,
        5.0,
    ),
    (
        "hundred_thousand",
        Size {
            first_organization: 200,
            other_organizations: 499,
            of_each_other: 200,
        },
        3,
        30.0,
    ),
];

pub(crate) async fn run(report: &mut Report, postgres: &PrivatePostgres) -> Result<()> {
    for (name, size, refreshes, seconds_max) in DATABASES {
        let database = members::database(postgres, name, &size).await?;
        for statement in FILL.split(';') {
            database.batch_execute(statement).await?;
        }
        let title = format!("refresh of both views, {} members", size.all());
        let mut section = report.section(
            &title,
            &["CONCURRENTLY, 30 permissions a member, after one member's role has changed"],
        );
        let taken = refresh(&database, refreshes).await?;
        let what = format!("{title}, median of {refreshes}");
        section.ask(&what, taken[refreshes / 2], Unit::Seconds, seconds_max);
        section.tell("the longest", taken[refreshes - 1], Unit::Seconds);
    }
    warm_starts(report, &postgres.url_for(DATABASES[0].0)).await
}

/// What each took, in seconds, ascending.
async fn refresh(database: &Client, times: usize) -> Result<Vec<f64>> {
    let mut taken = Vec::with_capacity(times);
    for _ in 0..times {
        database.execute(CHANGE, &[]).await?;
        let started = Instant::now();
        database.execute(REFRESH, &[]).await?;
        taken.push(started.elapsed().as_secs_f64());
        let differences: i64 = database.query_one(DIFFERENCES, &[]).await?.get(0);
        if differences != 0 {
            return Err("a refresh has left out the change".into());
        }
    }
    taken.sort_by(f64::total_cmp);
    Ok(taken)
}

async fn warm_starts(report: &mut Report, url: &str) -> Result<()> {
    let mut section = report.section(
        "warm start, 10,000 members",
        &["the real program, as its own log has it; the matrix is true"],
    );
    let mut taken = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        let log = Service::start(url, 1_000_000).await?.stop()?;
        taken.push(warm_start(&log)?.as_secs_f64());
    }
    taken.sort_by(f64::total_cmp);
    let what = format!("warm start of 10,000 users, median of {STARTS}");
    section.ask(&what, taken[STARTS / 2], Unit::Seconds, WARM_START_S_MAX);
    section.tell("the longest", taken[STARTS - 1], Unit::Seconds);
    Ok(())
}
