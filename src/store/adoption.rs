//! Looks at a database that hallpass is about to be put on: what stands against it, and what will change.
//!
//! Invariant: it only reads. What it finds is told all at once, before anything is changed.

use tokio_postgres::Client;

use super::StoreError;

/// What a look at the database found, a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Survey {
    /// What must be mended first; none: hallpass can be put there.
    pub(super) blockers: Vec<String>,
    /// What will change for the application, and what to know.
    pub(super) notes: Vec<String>,
}

const SURVEY: &str = include_str!("survey.sql");

/// Queries, for those tables and columns that are there, each of one line a finding.
const SURVEYS_OF_ROWS: &str = r#"
WITH shape AS (
    SELECT CASE WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.profiles')
                             AND attname = 'user_id' AND NOT attisdropped) THEN 'user_id' ELSE 'id' END AS user_column
), queries (is_blocker, name, columns, query) AS (
    SELECT true, name, columns, $$
        SELECT format('public.%1$I: %%s values of (%2$s) come more than once, such as (%%s)', count(*), min(example))
        FROM (SELECT concat_ws(', ', %2$s) AS example FROM public.%1$I
              WHERE num_nulls(%2$s) = 0 GROUP BY %2$s HAVING count(*) > 1) repeated
        HAVING count(*) > 0 $$
    FROM shape, LATERAL (VALUES ('profiles', ARRAY['org_id', user_column]),
                                ('organization_permissions', ARRAY['org_id', 'permission_key']),
                                ('organization_permission_templates', ARRAY['permission_key'])) keys (name, columns)
    UNION ALL
    SELECT false, 'profiles', ARRAY['role', 'org_id'], $$
        SELECT format('role %%s of %%s members is not on the role ladder: it satisfies no permission',
                      coalesce(quote_literal(role::text), 'NULL'), count(*))
        FROM public.%1$I
        WHERE org_id IS NOT NULL AND coalesce(role::text, '') <> ALL ($$ || quote_literal(ladder) || $$)
        GROUP BY role ORDER BY count(*) DESC, role LIMIT 20 $$
    FROM (SELECT CASE WHEN to_regclass('public.permission_roles') IS NULL
                 THEN '{parent_member,teacher,volunteer,committee_lead,board_member,admin}' END) l (ladder)
    WHERE ladder IS NOT NULL
    UNION ALL
    SELECT false, 'profiles', ARRAY['user_id', 'org_id'], $$
        SELECT format('user_has_org_permission, and a policy that calls it, fails from now on for users of several '
                      'organizations: %%s', count(*))
        FROM (SELECT FROM public.%1$I WHERE user_id IS NOT NULL AND org_id IS NOT NULL
              GROUP BY user_id HAVING count(DISTINCT org_id) > 1) several
        HAVING count(*) > 0 $$
)
SELECT is_blocker, format(query, name, array_to_string(columns, ', ')) FROM queries
WHERE cardinality(columns) = (SELECT count(*) FROM pg_attribute
                              WHERE attrelid = to_regclass('public.' || name) AND attname = ANY (columns) AND NOT attisdropped)"#;

/// # Errors
/// When the database cannot be asked.
pub(super) async fn survey(client: &Client) -> Result<Survey, StoreError> {
    let mut findings: Vec<(bool, String)> = Vec::new();
    for row in client.query(SURVEY, &[]).await? {
        findings.push((row.try_get(0)?, row.try_get(1)?));
    }
    let is_blocked = findings.iter().any(|(is_blocker, _)| *is_blocker);
    for query in client.query(SURVEYS_OF_ROWS, &[]).await? {
        let is_blocker = query.try_get(0)?;
        match client.query(query.try_get::<_, &str>(1)?, &[]).await {
            Ok(rows) => {
                for row in rows {
                    findings.push((is_blocker, row.try_get(0)?));
                }
            }
            // A table of another owner, a column of another type: its rows cannot be looked at, and it was told why.
            Err(_) if is_blocked => {}
            Err(error) => return Err(error.into()),
        }
    }
    let of_kind = |is_blocker| {
        let lines = findings.iter().filter(|(kind, _)| *kind == is_blocker);
        lines.map(|(_, line)| on_one_line(line)).collect()
    };
    Ok(Survey {
        blockers: of_kind(true),
        notes: of_kind(false),
    })
}

/// Names and values are whatever the application let in, and the lines become comments of a script.
fn on_one_line(finding: &str) -> String {
    finding.replace(char::is_control, " ")
}
