//! Where answers come from, how fresh they say they are, and that a change costs the cache what it must and no more.

use std::time::{Duration, Instant};

use hallpass::server::Config;
use hallpass_client::v1::{
    BatchCheckPermissionsItem, BatchCheckPermissionsRequest, Explanation, MinRoleSource, Source,
};

use crate::{
    database::Database,
    deadlines::TableLock,
    names::id,
    server::{
        APPROVE, Answer, MEMBERS, ORGANIZATIONS, Server, config, fill, head, question, run_sql,
        seq, set_role,
    },
};

/// A revocation on an idle machine takes some milliseconds. This is for one that is busy with other tests.
const REVOCATION_MAX: Duration = Duration::from_secs(5);

/// Changes that are seen at once, each time.
const IMMEDIATE_CHANGES: usize = 200;

/// Members changed by one statement.
const LARGE_ENTRY_ROWS: usize = 20_000;

#[tokio::test]
async fn the_first_answer_is_the_database_s_and_the_second_the_cache_s() {
    let database = Database::create().await;
    let client = database.client().await;
    let server = Server::start(config(&database.url)).await;
    fill(&client).await;
    server.catch_up(&client).await;
    for (user, permission) in [("bob", APPROVE), ("stranger", APPROVE), ("bob", "no_such")] {
        let database_is_asked = permission != "no_such";
        let first = server.check("lincoln", user, permission).await;
        assert_eq!(first.is_cached(), !database_is_asked, "{user}: {first}");
        let second = server.check("lincoln", user, permission).await;
        assert!(second.is_cached(), "{user}: {second}");
        assert_eq!(first.said, second.said);
        for answer in [first, second] {
            assert_eq!(answer.seq(), head(&client).await);
            assert!(answer.staleness() <= Duration::from_secs(2), "{answer}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn members_are_cached_when_the_service_is_ready() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    for organization in ORGANIZATIONS {
        for (user, _) in MEMBERS {
            let answer = server.check(organization, user, APPROVE).await;
            assert!(answer.is_cached(), "{user}: {answer}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn fully_consistent_answers_have_every_commit_before_the_call() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    for round in 0..IMMEDIATE_CHANGES {
        let (role, expected) = if round % 2 == 0 {
            ("volunteer", "deny ROLE_TOO_LOW")
        } else {
            ("board_member", "allow GRANTED_BY_ROLE")
        };
        set_role(&client, "lincoln", "bob", role).await;
        // Something to join, sent before or after the change: it must not be joined.
        let (answer, _) = tokio::join!(
            server.check_now("lincoln", "bob", APPROVE),
            server.check("lincoln", "bob", APPROVE),
        );
        assert_eq!(answer.said, expected, "round {round}: {answer}");
        assert!(!answer.is_cached(), "round {round}: {answer}");
        assert!(answer.seq() >= head(&client).await, "round {round}");
        assert_eq!(answer.staleness(), Duration::ZERO);
    }
    server.stop().await;
}

/// A statement that is on its way since before the commit is not joined, and what it finds is not remembered.
#[tokio::test]
async fn a_fully_consistent_answer_is_no_older_statement_s() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    set_role(&client, "lincoln", "eve", "board_member").await;
    server.catch_up(&client).await;
    // Where a load may believe the matrix it has its snapshot already, and waits. What must be fresh asks for no matrix.
    let lock = TableLock::take(&database, "hallpass.matrix_stamp").await;
    let (older, now) = tokio::join!(server.check("lincoln", "eve", APPROVE), async {
        lock.until_waiting(1).await;
        set_role(&client, "lincoln", "eve", "volunteer").await;
        let now = server.check_now("lincoln", "eve", APPROVE).await;
        lock.release();
        now
    });
    assert_eq!(older.said, "allow GRANTED_BY_ROLE", "{older}");
    assert_eq!(now.said, "deny ROLE_TOO_LOW", "{now}");
    assert!(older.seq() < now.seq());
    server.catch_up(&client).await;
    let cached = server.check("lincoln", "eve", APPROVE).await;
    assert_eq!(cached.said, "deny ROLE_TOO_LOW", "{cached}");
    server.stop().await;
}

#[tokio::test]
async fn a_load_that_was_sent_before_the_bound_is_not_joined() {
    let database = Database::create().await;
    let server = Server::start(Config {
        staleness_bound: Duration::ZERO,
        ..config(&database.url)
    })
    .await;
    let lock = TableLock::take(&database, "public.permission_roles").await;
    let ask = || {
        let mut client = server.client();
        let question = question("lincoln", "eve", APPROVE);
        tokio::spawn(async move { client.check_permission(question).await })
    };
    let first = ask();
    lock.until_waiting(1).await;
    let second = ask();
    lock.until_waiting(2).await;
    lock.release();
    first.await.unwrap().unwrap();
    let second = Answer::from(second.await.unwrap().unwrap().into_inner());
    assert_eq!(second.staleness(), Duration::ZERO);
    server.stop().await;
}

/// Asks until the answer is the new one, which every answer from the change's position on must be.
async fn until_changed(server: &Server, change: i64, old: &str, new: &str) -> Answer {
    let asked = Instant::now();
    loop {
        let answer = server.check("lincoln", "bob", APPROVE).await;
        let expected = if answer.seq() >= change { new } else { old };
        if answer.said == new {
            return answer;
        }
        assert_eq!(answer.said, expected, "at {change}: {answer}");
        assert!(asked.elapsed() < REVOCATION_MAX, "still {answer}");
    }
}

#[tokio::test]
async fn a_commit_reaches_cached_answers_by_itself() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let (deny, allow) = ("deny ROLE_TOO_LOW", "allow GRANTED_BY_ROLE");
    for round in 0..20 {
        // Cached, so that it is the log that must take it back.
        while !server.check("lincoln", "bob", APPROVE).await.is_cached() {}
        let (role, old, new) = if round % 2 == 0 {
            ("volunteer", allow, deny)
        } else {
            ("board_member", deny, allow)
        };
        set_role(&client, "lincoln", "bob", role).await;
        let answer = until_changed(&server, head(&client).await, old, new).await;
        assert!(answer.seq() >= head(&client).await, "{answer}");
    }
    server.stop().await;
}

/// Whoever owns the audit log can delete from it; what is left of the entry says only that there was one.
#[tokio::test]
async fn a_change_whose_audit_rows_are_deleted_reaches_cached_answers() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    while !server.check("lincoln", "bob", APPROVE).await.is_cached() {}
    let change = "
        BEGIN;
        UPDATE public.profiles SET role = 'volunteer';
        DELETE FROM public.permission_audit_log WHERE change_type = 'UPDATE';
        COMMIT";
    client.batch_execute(change).await.unwrap();
    let (allow, deny) = ("allow GRANTED_BY_ROLE", "deny ROLE_TOO_LOW");
    until_changed(&server, head(&client).await, allow, deny).await;
    server.stop().await;
}

#[tokio::test]
async fn a_batch_is_as_fresh_as_its_stalest_answer() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let ask = async |users: &[&str]| {
        let items = (users.iter())
            .map(|user| BatchCheckPermissionsItem {
                organization_id: id("lincoln").to_string(),
                user_id: id(user).to_string(),
                permission: APPROVE.to_owned(),
            })
            .collect();
        let request = BatchCheckPermissionsRequest {
            items,
            consistency: None,
        };
        let response = server.client().batch_check_permissions(request).await;
        response.unwrap().into_inner().evidence.unwrap()
    };
    let before = head(&client).await;
    let cached = ask(&["ann", "bob"]).await;
    assert_eq!(cached.source(), Source::Cache);
    assert_eq!(seq(&cached.position), before);
    // Of the two one is cached: the position is the older of both, whichever that is.
    set_role(&client, "franklin", "bob", "volunteer").await;
    let mixed = ask(&["ann", "stranger"]).await;
    assert_eq!(mixed.source(), Source::Database);
    assert!((before..=head(&client).await).contains(&seq(&mixed.position)));
    let again = ask(&["ann", "stranger"]).await;
    assert_eq!(again.source(), Source::Cache);
    assert!(seq(&again.position) >= seq(&mixed.position));
    server.stop().await;
}

/// What an explained check says, and why: (what changes, organization, user, permission, answer, facts).
#[tokio::test]
async fn explanations_have_the_facts_of_every_reason() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let facts =
        |role: &str, rank: Option<i32>, min_role: &str, source: MinRoleSource, enabled, by_name| {
            Explanation {
                role: role.to_owned(),
                role_rank: rank,
                effective_min_role: min_role.to_owned(),
                min_role_source: source.into(),
                enabled,
                specific_user: by_name,
            }
        };
    use MinRoleSource::{Override, Template, Unspecified};
    let board = "board_member";
    #[rustfmt::skip]
    let cases = [
        ("", "bob", APPROVE, "allow GRANTED_BY_ROLE", facts(board, Some(3), board, Template, true, false)),
        ("", "vic", APPROVE, "deny ROLE_TOO_LOW", facts("volunteer", Some(1), board, Template, true, false)),
        ("", "stranger", APPROVE, "deny NOT_A_MEMBER", facts("", None, board, Unspecified, false, false)),
        ("", "bob", "no_such", "deny UNKNOWN_PERMISSION", facts(board, Some(3), "", Unspecified, false, false)),
        ("", "stranger", "no_such", "deny UNKNOWN_PERMISSION", facts("", None, "", Unspecified, false, false)),
        ("INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required, specific_users)
          VALUES (:lincoln, 'can_approve_expenses', 'admin', ARRAY[:vic])",
         "vic", APPROVE, "allow GRANTED_TO_USER", facts("volunteer", Some(1), "admin", Override, true, true)),
        ("", "bob", APPROVE, "deny ROLE_TOO_LOW", facts(board, Some(3), "admin", Override, true, false)),
        ("UPDATE public.organization_permissions SET min_role_required = NULL",
         "bob", APPROVE, "allow GRANTED_BY_ROLE", facts(board, Some(3), board, Template, true, false)),
        ("UPDATE public.organization_permissions SET is_enabled = false",
         "vic", APPROVE, "deny PERMISSION_DISABLED", facts("volunteer", Some(1), board, Template, false, true)),
        ("UPDATE public.profiles SET role = 'mascot' WHERE user_id = :pat",
         "pat", "can_view_budget", "deny ROLE_TOO_LOW", facts("mascot", None, "volunteer", Template, true, false)),
        ("UPDATE public.profiles SET role = NULL WHERE user_id = :pat",
         "pat", "can_view_budget", "deny ROLE_TOO_LOW", facts("", None, "volunteer", Template, true, false)),
    ];
    for (sql, user, permission, said, expected) in cases {
        run_sql(&client, sql).await;
        let mut asked = question("lincoln", user, permission);
        asked.explain = true;
        let answer = server.try_check(asked).await.unwrap();
        assert_eq!(answer.said, said, "{user} {permission}: {answer}");
        assert_eq!(
            answer.response.explanation,
            Some(expected),
            "{user} {permission}"
        );
        assert!(!answer.is_cached());
        assert_eq!(answer.seq(), head(&client).await);
        assert_eq!(answer.staleness(), Duration::ZERO);
    }
    server.stop().await;
}

/// Whose entries a change may cost.
#[derive(Clone, Copy, Debug)]
enum Lost {
    Nobody,
    /// Organization and user.
    These(&'static [(&'static str, &'static str)]),
    Organization(&'static str),
    Everything,
}

impl Lost {
    fn includes(self, organization: &str, user: &str) -> bool {
        match self {
            Self::Nobody => false,
            Self::These(subjects) => subjects.contains(&(organization, user)),
            Self::Organization(lost) => organization == lost,
            Self::Everything => true,
        }
    }
}

const CHANGES: &[(&str, Lost)] = &[
    (
        "UPDATE public.profiles SET role = 'volunteer' WHERE org_id = :lincoln AND user_id = :bob",
        Lost::These(&[("lincoln", "bob")]),
    ),
    (
        "UPDATE public.profiles SET role = 'admin' WHERE user_id IN (:bob, :vic)",
        Lost::These(&[
            ("lincoln", "bob"),
            ("lincoln", "vic"),
            ("franklin", "bob"),
            ("franklin", "vic"),
        ]),
    ),
    (
        "UPDATE public.profiles SET first_name = 'Ann', email = 'ann@example.org', updated_at = now()",
        Lost::Nobody,
    ),
    ("UPDATE public.profiles SET role = role", Lost::Nobody),
    (
        "INSERT INTO public.profiles (org_id, user_id, role) VALUES (:franklin, :eve, 'admin')",
        Lost::These(&[("franklin", "eve")]),
    ),
    (
        "UPDATE public.profiles SET org_id = :lincoln WHERE user_id = :eve",
        Lost::These(&[("franklin", "eve"), ("lincoln", "eve")]),
    ),
    (
        "DELETE FROM public.profiles WHERE user_id = :eve",
        Lost::These(&[("lincoln", "eve")]),
    ),
    (
        "INSERT INTO public.organization_permissions (org_id, permission_key, specific_users)
         VALUES (:lincoln, 'can_approve_expenses', ARRAY[:vic, :pat])",
        Lost::These(&[("lincoln", "vic"), ("lincoln", "pat")]),
    ),
    (
        "UPDATE public.organization_permissions SET specific_users = ARRAY[:cam, :vic]",
        Lost::These(&[("lincoln", "cam"), ("lincoln", "pat")]),
    ),
    (
        "UPDATE public.organization_permissions SET specific_users = ARRAY[:vic, :cam, :vic], updated_at = now()",
        Lost::Nobody,
    ),
    (
        "UPDATE public.organization_permissions SET specific_users = ARRAY[:vic, NULL, :cam], is_enabled = NULL",
        Lost::Nobody,
    ),
    (
        "UPDATE public.organization_permissions SET min_role_required = 'admin'",
        Lost::Organization("lincoln"),
    ),
    (
        "UPDATE public.organization_permissions SET min_role_required = NULL, specific_users = NULL",
        Lost::Organization("lincoln"),
    ),
    (
        "UPDATE public.organization_permissions SET is_enabled = false",
        Lost::Organization("lincoln"),
    ),
    (
        "DELETE FROM public.organization_permissions",
        Lost::Organization("lincoln"),
    ),
    (
        "INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required)
         VALUES (:franklin, 'can_view_budget', 'board_member')",
        Lost::Organization("franklin"),
    ),
    (
        "UPDATE public.organization_permissions SET org_id = :lincoln",
        Lost::Everything,
    ),
    (
        "UPDATE public.organization_permission_templates SET default_min_role = 'admin'
         WHERE permission_key = 'can_approve_expenses'",
        Lost::Everything,
    ),
    (
        "DELETE FROM public.organization_permission_templates WHERE permission_key = 'can_send_emails'",
        Lost::Everything,
    ),
    (
        "UPDATE public.permission_roles SET rank = 5 WHERE role_key = 'volunteer'",
        Lost::Everything,
    ),
    ("TRUNCATE public.organization_permissions", Lost::Everything),
];

#[tokio::test]
async fn a_change_costs_the_entries_that_it_changes_and_no_others() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let subjects = || {
        let users = MEMBERS.into_iter().map(|(user, _)| user).chain(["eve"]);
        users.flat_map(|user| ORGANIZATIONS.map(|organization| (organization, user)))
    };
    for (sql, lost) in CHANGES {
        for (organization, user) in subjects() {
            while !server.check(organization, user, APPROVE).await.is_cached() {}
        }
        run_sql(&client, sql).await;
        server.catch_up(&client).await;
        for (organization, user) in subjects() {
            let answer = server.check(organization, user, APPROVE).await;
            let is_lost = lost.includes(organization, user);
            assert_eq!(
                !answer.is_cached(),
                is_lost,
                "{sql}: {organization} {user}: {answer}"
            );
            let truth = server.check_now(organization, user, APPROVE).await;
            assert_eq!(answer.said, truth.said, "{sql}: {organization} {user}");
            assert!(answer.seq() >= head(&client).await, "{sql}: {answer}");
        }
    }
    server.stop().await;
}

/// Its rows make many pages of the log: the position moves only past the whole.
#[tokio::test]
async fn an_entry_of_many_pages_is_applied_whole() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let insert = format!(
        "INSERT INTO public.profiles (org_id, user_id, role)
         SELECT :lincoln, md5('parent ' || i)::uuid, 'volunteer' FROM generate_series(1, {LARGE_ENTRY_ROWS}) i"
    );
    run_sql(&client, &insert).await;
    let mut config = config(&database.url);
    // Most are not cached: the entries that are matter here.
    config.warm_up_max = Duration::from_millis(1);
    let server = Server::start(config).await;
    let rows = client
        .query(
            "SELECT user_id::text FROM public.profiles WHERE role = 'volunteer' AND org_id = $1 ORDER BY md5(user_id::text) LIMIT 200",
            &[&id("lincoln")],
        )
        .await
        .unwrap();
    let sample: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let ask = async |user: &str| {
        let mut question = question("lincoln", "bob", APPROVE);
        user.clone_into(&mut question.user_id);
        server.try_check(question).await.unwrap()
    };
    for user in &sample {
        while !ask(user).await.is_cached() {}
    }
    run_sql(
        &client,
        "UPDATE public.profiles SET role = 'admin' WHERE org_id = :lincoln",
    )
    .await;
    let change = head(&client).await;
    // Until the first that has the entry, which has the whole of it.
    for user in sample.iter().cycle() {
        let answer = ask(user).await;
        if answer.seq() >= change {
            assert_eq!(answer.said, "allow GRANTED_BY_ROLE", "{answer}");
            break;
        }
        assert!(answer.is_cached(), "{answer}");
    }
    server.catch_up(&client).await;
    for user in &sample {
        let answer = ask(user).await;
        assert_eq!(answer.said, "allow GRANTED_BY_ROLE", "{answer}");
        assert!(answer.seq() >= change, "{answer}");
    }
    server.stop().await;
}
