//! Changes that go past the log, and a log whose history turns out to be another.

use std::time::Duration;

use hallpass_client::v1::{
    BatchCheckPermissionsItem, BatchCheckPermissionsRequest,
    batch_check_permissions_result::Result as ItemResult,
};
use tokio_postgres::Client;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    database::{Database, eventually},
    names::id,
    server::{APPROVE, MEMBERS, ORGANIZATIONS, Server, config, fill, head, run_sql, seq, set_role},
};

const INSPECTION_INTERVAL: Duration = Duration::from_millis(50);

/// A service that inspects often, on a filled database.
async fn start() -> (Database, Client, Server) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let mut config = config(&database.url);
    config.inspection_interval = INSPECTION_INTERVAL;
    let server = Server::start(config).await;
    (database, client, server)
}

/// Every answer, from wherever, is the one that the tables have now.
async fn assert_all_right(server: &Server, client: &Client) {
    for organization in ORGANIZATIONS {
        for (user, _) in MEMBERS {
            let answer = server.check(organization, user, APPROVE).await;
            let ask = "SELECT user_has_permission_in_org($1, $2, $3)";
            let truth = client
                .query_one(ask, &[&id(organization), &id(user), &APPROVE])
                .await;
            let truth: bool = truth.unwrap().get(0);
            let allowed = answer.response.allowed;
            assert_eq!(allowed, truth, "{organization} {user}: {answer}");
        }
    }
}

async fn until_cached(server: &Server) {
    eventually("answers come from the cache again", async || {
        server.check("lincoln", "bob", APPROVE).await.is_cached()
    })
    .await;
}

async fn matrix_is_believed(client: &Client) -> bool {
    let ask = "SELECT hallpass.matrix_is_true($1)";
    let row = client.query_one(ask, &[&id("lincoln")]).await;
    row.unwrap().get(0)
}

/// What makes the log incomplete, and what mends it.
pub(crate) const BYPASSES: [(&str, &str); 4] = [
    (
        "ALTER TABLE public.profiles DISABLE TRIGGER hallpass_record_update",
        "ALTER TABLE public.profiles ENABLE ALWAYS TRIGGER hallpass_record_update",
    ),
    (
        "ALTER TABLE public.profiles DISABLE TRIGGER USER",
        "ALTER TABLE public.profiles ENABLE ALWAYS TRIGGER hallpass_record_insert,
                                     ENABLE ALWAYS TRIGGER hallpass_record_update,
                                     ENABLE ALWAYS TRIGGER hallpass_record_delete,
                                     ENABLE ALWAYS TRIGGER hallpass_record_truncate",
    ),
    // Enabled, and yet off for a session that says it replicates.
    (
        "ALTER TABLE public.profiles ENABLE TRIGGER hallpass_record_update;
         SET session_replication_role = 'replica'",
        "ALTER TABLE public.profiles ENABLE ALWAYS TRIGGER hallpass_record_update;
         SET session_replication_role = 'origin'",
    ),
    (
        "ALTER TABLE hallpass.log_pending DISABLE TRIGGER number_entry",
        "ALTER TABLE hallpass.log_pending ENABLE ALWAYS TRIGGER number_entry",
    ),
];

#[tokio::test]
async fn while_changes_go_unrecorded_nothing_comes_from_the_cache_nor_from_the_matrix() {
    let (_database, client, server) = start().await;
    for (bypass, mend) in BYPASSES {
        until_cached(&server).await;
        // So that the log says that the matrix is the truth, which it will not be.
        eventually("the matrix is refreshed", async || {
            // Fails while the service does the same.
            let refresh = "SELECT public.refresh_permission_materialized_views()";
            client.batch_execute(refresh).await.is_ok() && matrix_is_believed(&client).await
        })
        .await;
        run_sql(&client, bypass).await;
        server.until_health(ServingStatus::NotServing).await;
        for role in ["volunteer", "board_member"] {
            let before = head(&client).await;
            set_role_unrecorded(&client, "bob", role).await;
            assert_eq!(
                head(&client).await,
                before,
                "{bypass}: recorded all the same"
            );
            assert_all_right(&server, &client).await;
            assert!(!server.check("lincoln", "bob", APPROVE).await.is_cached());
        }
        // What is remembered of bob is wrong from here on.
        set_role_unrecorded(&client, "bob", "volunteer").await;
        run_sql(&client, mend).await;
        eventually("answers come from the cache again", async || {
            let answer = server.check("lincoln", "bob", APPROVE).await;
            assert_eq!(answer.said, "deny ROLE_TOO_LOW", "{answer}");
            answer.is_cached()
        })
        .await;
        server.until_health(ServingStatus::Serving).await;
        assert_all_right(&server, &client).await;
        set_role(&client, "lincoln", "bob", "board_member").await;
        server.catch_up(&client).await;
        assert_all_right(&server, &client).await;
    }
    server.stop().await;
}

/// By UPDATE, in both organizations.
async fn set_role_unrecorded(client: &Client, user: &str, role: &str) {
    let sql = format!("UPDATE public.profiles SET role = '{role}' WHERE user_id = :{user}");
    run_sql(client, &sql).await;
}

#[tokio::test]
async fn a_bypass_that_is_over_before_the_inspection_is_found_all_the_same() {
    let (_database, client, server) = start().await;
    let (disable, enable) = BYPASSES[1];
    for unrecorded in [
        "UPDATE public.profiles SET role = 'volunteer' WHERE user_id = :bob",
        "DELETE FROM public.profiles WHERE user_id = :ann",
        "TRUNCATE public.profiles",
    ] {
        until_cached(&server).await;
        let before = head(&client).await;
        let transaction = format!("BEGIN; {disable}; {unrecorded}; {enable}; COMMIT");
        run_sql(&client, &transaction).await;
        eventually("everything is taken as changed", async || {
            head(&client).await > before
        })
        .await;
        server.catch_up(&client).await;
        assert_all_right(&server, &client).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn the_matrix_is_refreshed_in_the_background_and_believed_again() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let mut config = config(&database.url);
    config.matrix_refresh_interval = Duration::from_millis(50);
    let server = Server::start(config).await;
    let is_believed = async || matrix_is_believed(&client).await;
    for role in ["volunteer", "board_member", "admin"] {
        eventually("the matrix is believed", &is_believed).await;
        set_role(&client, "lincoln", "bob", role).await;
        let answer = server.check_now("lincoln", "bob", APPROVE).await;
        assert_eq!(answer.response.allowed, role != "volunteer", "{answer}");
    }
    eventually("the matrix is believed", &is_believed).await;
    let row = client
        .query_one(
            "SELECT role::text FROM public.user_permission_matrix WHERE org_id = $1 AND user_id = $2 LIMIT 1",
            &[&id("lincoln"), &id("bob")],
        )
        .await;
    assert_eq!(row.unwrap().get::<_, &str>(0), "admin");
    server.stop().await;
}

/// Undoes every commit after `kept` as a failover to a standby that lacked them does, in one transaction with `then`.
pub(crate) async fn fail_over(client: &Client, kept: i64, undo: &str, then: &str) {
    let (disable, enable) = BYPASSES[1];
    // setval's third argument: whether the number has been given out.
    let lose = format!(
        "BEGIN; {disable}; {undo}; {enable};
         DELETE FROM public.permission_audit_log WHERE entry_id IN (SELECT entry_id FROM hallpass.log WHERE seq > {kept});
         DELETE FROM hallpass.log_org WHERE seq > {kept};
         DELETE FROM hallpass.log WHERE seq > {kept};
         SELECT setval('hallpass.log_seq', {kept});
         {then}; COMMIT"
    );
    run_sql(client, &lose).await;
}

#[tokio::test]
async fn a_history_that_lost_commits_is_another() {
    // What comes after the failover: nothing, one commit in the place of the lost one, and more than were lost.
    let cases = [
        ("", 0),
        (
            "UPDATE public.profiles SET role = 'admin' WHERE user_id = :cam",
            1,
        ),
        (
            "UPDATE public.profiles SET role = 'admin' WHERE user_id = :cam;
             UPDATE public.profiles SET role = 'admin' WHERE user_id = :vic;
             UPDATE public.profiles SET role = 'admin' WHERE user_id = :pat",
            3,
        ),
    ];
    for (then, commits) in cases {
        let database = Database::create().await;
        let client = database.client().await;
        fill(&client).await;
        let server = Server::start(config(&database.url)).await;
        let kept = head(&client).await;
        set_role(&client, "lincoln", "pat", "admin").await;
        server.catch_up(&client).await;
        while !server.check("lincoln", "pat", APPROVE).await.is_cached() {}
        let lost = server.check("lincoln", "pat", APPROVE).await;
        assert_eq!(lost.said, "allow GRANTED_BY_ROLE");
        assert_eq!(lost.seq(), kept + 1);

        let undo = "UPDATE public.profiles SET role = 'parent_member' WHERE user_id = :pat";
        fail_over(&client, kept, undo, then).await;
        assert_eq!(head(&client).await, kept + commits);
        server.catch_up(&client).await;
        assert_all_right(&server, &client).await;
        until_cached(&server).await;
        assert_eq!(server.health("").await, ServingStatus::Serving);
        let found = server.check("lincoln", "pat", APPROVE).await;
        assert_ne!(found.evidence.position, lost.evidence.position);
        // And it goes on from there.
        set_role(&client, "franklin", "bob", "volunteer").await;
        server.catch_up(&client).await;
        assert_all_right(&server, &client).await;
        server.stop().await;
    }
}

/// While it lives, the feed of a test's services stays away from the database; their other connections stay.
struct FeedAway<'a>(&'a Client);

impl<'a> FeedAway<'a> {
    async fn send(client: &'a Client) -> Self {
        const END_FEED: &str = "
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND query LIKE '%page.everything%' AND pid <> pg_backend_pid()";
        let away = Self(client);
        away.admit(0).await;
        assert_eq!(client.query(END_FEED, &[]).await.unwrap().len(), 1);
        away
    }

    async fn back(self) {
        self.admit(-1).await;
    }

    /// The superuser comes in always.
    async fn admit(&self, connections: i32) {
        let admit = format!(
            "DO $$ BEGIN
                 EXECUTE format('ALTER DATABASE %I CONNECTION LIMIT {connections}', current_database());
             END $$"
        );
        self.0.batch_execute(&admit).await.unwrap();
    }
}

const UNDO_PAT: &str = "UPDATE public.profiles SET role = 'parent_member' WHERE user_id = :pat";
const CAM_AND_VIC: &str = "UPDATE public.profiles SET role = 'admin' WHERE user_id = :cam;
                           UPDATE public.profiles SET role = 'admin' WHERE user_id = :vic";

/// While the feed is away loads go on, and see a position of the new history that is greater than any that was lost.
#[tokio::test]
async fn a_history_that_a_load_has_seen_first_is_another_all_the_same() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let kept = head(&client).await;
    set_role(&client, "lincoln", "pat", "admin").await;
    server.catch_up(&client).await;
    while !server.check("lincoln", "pat", APPROVE).await.is_cached() {}

    let away = FeedAway::send(&client).await;
    fail_over(&client, kept, UNDO_PAT, CAM_AND_VIC).await;
    let seen = server.check_now("lincoln", "cam", APPROVE).await;
    assert_eq!(seen.seq(), kept + 2);
    away.back().await;

    server.catch_up(&client).await;
    assert_all_right(&server, &client).await;
    server.stop().await;
}

/// What the cache would say of it has a position that this history never had.
#[tokio::test]
async fn what_a_load_finds_in_another_history_is_not_remembered() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let kept = head(&client).await;
    for role in ["admin", "volunteer", "admin"] {
        set_role(&client, "lincoln", "pat", role).await;
    }
    server.catch_up(&client).await;
    while !server.check("lincoln", "pat", APPROVE).await.is_cached() {}

    let away = FeedAway::send(&client).await;
    fail_over(&client, kept, UNDO_PAT, CAM_AND_VIC).await;
    for _ in 0..2 {
        let found = server.check("franklin", "stranger", APPROVE).await;
        assert_eq!(found.seq(), kept + 2, "{found}");
        assert!(!found.is_cached());
    }
    // Nor does it share a batch with what is remembered of the history before.
    let items = ["pat", "nobody"].map(|user| BatchCheckPermissionsItem {
        organization_id: id("lincoln").to_string(),
        user_id: id(user).to_string(),
        permission: APPROVE.to_owned(),
    });
    let request = BatchCheckPermissionsRequest {
        items: items.into(),
        consistency: None,
    };
    let batch = server.client().batch_check_permissions(request).await;
    let batch = batch.unwrap().into_inner();
    assert_eq!(seq(&batch.evidence.unwrap().position), kept + 2);
    let [pat, nobody] = [0, 1].map(|item: usize| batch.results[item].result.clone().unwrap());
    assert!(matches!(pat, ItemResult::Error(_)), "{pat:?}");
    assert!(matches!(nobody, ItemResult::Answer(_)), "{nobody:?}");
    away.back().await;
    server.stop().await;
}

/// The lost commits reach back before the service's own inspection.
#[tokio::test]
async fn a_history_that_lost_what_the_inspection_saw_serves_from_the_cache_again() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let kept = head(&client).await - 5;
    fail_over(&client, kept, "SELECT", "SELECT").await;
    assert_eq!(head(&client).await, kept);
    server.catch_up(&client).await;
    until_cached(&server).await;
    assert_all_right(&server, &client).await;
    server.stop().await;
}

#[tokio::test]
async fn a_sequence_that_is_behind_the_log_is_mended() {
    let (_database, client, server) = start().await;
    let before = head(&client).await;
    let set_back = "SELECT setval('hallpass.log_seq', 1)";
    client.batch_execute(set_back).await.unwrap();
    eventually("the sequence is mended", async || {
        let ask = "SELECT last_value FROM hallpass.log_seq";
        client.query_one(ask, &[]).await.unwrap().get::<_, i64>(0) >= before
    })
    .await;
    set_role(&client, "lincoln", "bob", "volunteer").await;
    assert_eq!(head(&client).await, before + 1);
    server.catch_up(&client).await;
    assert_all_right(&server, &client).await;
    assert!(
        seq(&server
            .check("lincoln", "bob", APPROVE)
            .await
            .evidence
            .position)
            > before
    );
    server.stop().await;
}

/// The owner sees every row of the log; the service is somebody else.
#[tokio::test]
async fn rows_of_the_log_that_are_hidden_from_the_service_are_a_problem() {
    let (_database, client, server) = start().await;
    for table in [
        "hallpass.log",
        "hallpass.log_org",
        "public.permission_audit_log",
    ] {
        until_cached(&server).await;
        let hide = format!("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY");
        run_sql(&client, &hide).await;
        server.until_health(ServingStatus::NotServing).await;
        set_role(&client, "lincoln", "bob", "volunteer").await;
        assert_all_right(&server, &client).await;
        let show = format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY");
        run_sql(&client, &show).await;
        server.until_health(ServingStatus::Serving).await;
        server.catch_up(&client).await;
        assert_all_right(&server, &client).await;
        set_role(&client, "lincoln", "bob", "board_member").await;
    }
    server.stop().await;
}
