//! Who made a change, as a stream tells it: whatever the way in which it was made, and nobody's once it was made.

use hallpass_client::v1::{AuditFilter, stream_audit_entries_request::Start};

use crate::{
    consumer::Consumer,
    database::Database,
    names::id,
    server::{Server, config, fill, head, run_sql},
};

const CHANGE: &str = "UPDATE profiles SET role = CASE role WHEN 'admin' THEN 'volunteer' ELSE 'admin' END WHERE user_id = :bob AND org_id = :lincoln";

/// Transactions of one pooled connection, in this order, and how each is told: entries, actor, source, request,
/// session, role, login and application. What one sets must not be there for the next.
const CASES: &[(&str, &str)] = &[
    // psql, by hand.
    ("CHANGE", "1 - NONE - - hallpass hallpass psql"),
    // An application that says whom it serves, as set_session_variables does.
    (
        "BEGIN; SELECT set_session_variables(:ann, NULL, :lincoln, 'req-1', NULL, NULL); CHANGE; COMMIT",
        "1 ann SETTINGS req-1 - hallpass hallpass psql",
    ),
    // The next user of the pooled connection, who says nothing.
    ("CHANGE", "1 - NONE - - hallpass hallpass psql"),
    ("BEGIN; CHANGE; COMMIT", "1 - NONE - - hallpass hallpass psql"),
    // One whose transaction failed.
    (
        "BEGIN; SELECT set_session_variables(:ann, NULL, NULL, 'req-2', NULL, NULL); ROLLBACK; CHANGE",
        "1 - NONE - - hallpass hallpass psql",
    ),
    // Without a transaction around it, it holds for its own statement alone.
    ("SELECT set_session_variables(:ann, NULL, NULL, 'req-3', NULL, NULL)", ""),
    ("CHANGE", "1 - NONE - - hallpass hallpass psql"),
    // Another user right after.
    (
        "BEGIN; SELECT set_session_variables(:vic, NULL, NULL, NULL, NULL, NULL); CHANGE; COMMIT",
        "1 vic SETTINGS - - hallpass hallpass psql",
    ),
    // PostgREST, which sets claims and a role.
    (
        "BEGIN; SET LOCAL ROLE hallpass_auditor;
         SELECT set_config('request.jwt.claims', format('{\"sub\":\"%s\",\"session_id\":\"s-1\"}', :cam), true),
                set_config('request.headers', '{\"x-request-id\":\"req-4\"}', true);
         CHANGE; COMMIT",
        "1 cam JWT req-4 s-1 hallpass_auditor hallpass psql",
    ),
    ("CHANGE", "1 - NONE - - hallpass hallpass psql"),
    // Settings go before claims.
    (
        "BEGIN; SELECT set_config('request.jwt.claims', format('{\"sub\":\"%s\"}', :cam), true);
         SELECT set_session_variables(:ann, NULL, NULL, NULL, NULL, NULL); CHANGE; COMMIT",
        "1 ann SETTINGS - - hallpass hallpass psql",
    ),
    // Many rows of one statement, and several statements of one transaction.
    (
        "BEGIN; SELECT set_session_variables(:ann, NULL, NULL, 'req-5', NULL, NULL);
         UPDATE profiles SET role = 'parent_member' WHERE org_id = :franklin; CHANGE; COMMIT",
        "5 ann SETTINGS req-5 - hallpass hallpass psql",
    ),
    ("UPDATE profiles SET role = 'volunteer' WHERE org_id = :franklin", "5 - NONE - - hallpass hallpass psql"),
];

#[tokio::test]
async fn an_actor_is_told_as_it_was_and_leaks_to_nobody() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    run_sql(
        &client,
        "SET application_name = 'psql'; GRANT SELECT, UPDATE ON profiles TO hallpass_auditor",
    )
    .await;
    let server = Server::start(config(&database.url)).await;
    let start = Start::Now(true);
    let mut stream = Consumer::start(&server.channel, start, AuditFilter::default())
        .await
        .unwrap();
    for (sql, expected) in CASES {
        stream.entries.clear();
        run_sql(&client, &sql.replace("CHANGE", CHANGE)).await;
        stream.until(head(&client).await).await;
        let mut told: Vec<String> = (stream.entries.iter())
            .map(|entry| {
                let source = entry.actor_source().as_str_name();
                let name = |actor: &str| {
                    ["ann", "cam", "vic"]
                        .into_iter()
                        .find(|name| id(name).to_string() == actor)
                        .map_or(actor.to_owned(), str::to_owned)
                };
                [
                    &name(&entry.actor_user_id),
                    source.trim_start_matches("ACTOR_SOURCE_"),
                    &entry.request_id,
                    &entry.session_id,
                    &entry.database_role,
                    &entry.database_login,
                    &entry.application_name,
                ]
                .map(|value| if value.is_empty() { "-" } else { value })
                .join(" ")
            })
            .collect();
        let count = told.len();
        told.dedup();
        let told: Vec<String> = told.iter().map(|who| format!("{count} {who}")).collect();
        assert_eq!(told.join(", "), *expected, "{sql}");
    }
}
