//! `at_least_as_fresh` and `max_staleness`: no answer older than its position, none staler than its bound, and no
//! position of another history.

use std::time::Duration;

use hallpass::server::Config;
use hallpass_client::{
    tonic::{Code, Response, Status},
    v1::{
        BatchCheckPermissionsItem, BatchCheckPermissionsRequest, CheckPermissionRequest,
        Consistency, Evidence, GetOrganizationSummaryRequest, ListPermissionHoldersRequest,
        ListUserOrganizationsRequest, ListUserPermissionsRequest, Source, consistency::Requirement,
    },
};
use tokio_postgres::Client;
use tonic_types::StatusExt;

use crate::{
    bypass::fail_over,
    database::{Database, eventually},
    limits::wrong_fields,
    names::id,
    proxy::{Proxy, Way},
    server::{APPROVE, Answer, MEMBERS, Server, config, fill, question, run_sql, seq, set_role},
    start_stop::assert_unavailable,
};

const MINUTE: Duration = Duration::from_secs(60);

fn requirement(requirement: Requirement) -> Option<Consistency> {
    Some(Consistency {
        requirement: Some(requirement),
    })
}

fn at(position: &str) -> Option<Consistency> {
    requirement(Requirement::AtLeastAsFresh(position.to_owned()))
}

fn within(max: Duration) -> Option<Consistency> {
    requirement(Requirement::MaxStaleness(max.try_into().unwrap()))
}

/// Asks whether bob may approve, this fresh.
async fn ask(server: &Server, consistency: Option<Consistency>) -> Result<Answer, Status> {
    let asked = CheckPermissionRequest {
        consistency,
        ..question("lincoln", "bob", APPROVE)
    };
    server.try_check(asked).await
}

/// The position that an application gets after its commit.
async fn position(client: &Client) -> String {
    let row = client.query_one("SELECT hallpass.head()", &[]).await;
    row.unwrap().get(0)
}

/// The evidence of every read there is, asked with this consistency.
async fn read_all(
    server: &Server,
    consistency: Option<Consistency>,
) -> Vec<(&'static str, Result<Evidence, Status>)> {
    let mut client = server.client();
    let (organization_id, user_id) = (id("lincoln").to_string(), id("bob").to_string());
    let permission = APPROVE.to_owned();
    let check = CheckPermissionRequest {
        consistency: consistency.clone(),
        ..question("lincoln", "bob", APPROVE)
    };
    let explained = CheckPermissionRequest {
        explain: true,
        ..check.clone()
    };
    let items = vec![BatchCheckPermissionsItem {
        organization_id: organization_id.clone(),
        user_id: user_id.clone(),
        permission: permission.clone(),
    }];
    let batch = BatchCheckPermissionsRequest {
        items,
        consistency: consistency.clone(),
    };
    let list = ListUserPermissionsRequest {
        organization_id: organization_id.clone(),
        user_id: user_id.clone(),
        consistency: consistency.clone(),
        ..ListUserPermissionsRequest::default()
    };
    let holders = ListPermissionHoldersRequest {
        organization_id: organization_id.clone(),
        permission,
        consistency: consistency.clone(),
        ..ListPermissionHoldersRequest::default()
    };
    let organizations = ListUserOrganizationsRequest {
        user_id,
        consistency: consistency.clone(),
        ..ListUserOrganizationsRequest::default()
    };
    let summary = GetOrganizationSummaryRequest {
        organization_id,
        consistency,
    };
    macro_rules! evidence {
        ($answer:expr) => {
            $answer
                .await
                .map(Response::into_inner)
                .map(|answer| answer.evidence.unwrap())
        };
    }
    vec![
        ("check", evidence!(client.check_permission(check))),
        ("explain", evidence!(client.check_permission(explained))),
        ("batch", evidence!(client.batch_check_permissions(batch))),
        ("list", evidence!(client.list_user_permissions(list))),
        (
            "holders",
            evidence!(client.list_permission_holders(holders)),
        ),
        (
            "organizations",
            evidence!(client.list_user_organizations(organizations)),
        ),
        (
            "summary",
            evidence!(client.get_organization_summary(summary)),
        ),
    ]
}

fn assert_foreign(status: &Status) {
    assert_eq!(
        wrong_fields(status),
        ["consistency.at_least_as_fresh"],
        "{status:?}"
    );
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "POSITION_UNKNOWN", "{status:?}");
}

/// A service that trusts its cache for a minute, reads the database at one address and the log at another.
async fn start(database: &str, feed: &str) -> Server {
    Server::start(Config {
        feed_database: config(feed).database,
        staleness_bound: MINUTE,
        ..config(database)
    })
    .await
}

#[tokio::test]
async fn every_read_has_every_mode() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    server.catch_up(&client).await;
    let position = position(&client).await;
    for consistency in [
        None,
        requirement(Requirement::MinimizeLatency(true)),
        requirement(Requirement::FullyConsistent(true)),
        within(MINUTE),
        within(Duration::from_secs(300)),
        within(Duration::ZERO),
        at(&position),
        at(&format!("  {}\n", position.to_uppercase())),
        at("0-0"),
    ] {
        for (read, evidence) in read_all(&server, consistency.clone()).await {
            let evidence = evidence.unwrap_or_else(|status| panic!("{read}: {status:?}"));
            assert_eq!(evidence.position, position, "{read} {consistency:?}");
            let may_be_cached = ["check", "batch", "list"].contains(&read)
                && consistency != requirement(Requirement::FullyConsistent(true))
                && consistency != within(Duration::ZERO);
            if consistency != within(Duration::ZERO) {
                let is_cached = evidence.source() == Source::Cache;
                assert_eq!(is_cached, may_be_cached, "{read} {consistency:?}");
            }
        }
    }
    server.stop().await;
}

/// The cache cannot know that the member is gone, and whoever removed him can tell that it must.
#[tokio::test]
async fn a_check_at_the_position_of_a_removal_never_allows() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    run_sql(&client, "UPDATE public.profiles SET role = 'admin'").await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = start(&database.url, &proxy.url).await;
    server.catch_up(&client).await;
    proxy.set(Way::Silent);
    for (user, _) in MEMBERS {
        let known = server.check("lincoln", user, APPROVE).await;
        assert!(known.is_cached() && known.response.allowed, "{known}");
        let at = |position: &str| CheckPermissionRequest {
            consistency: at(position),
            ..question("lincoln", user, APPROVE)
        };
        let remove = "DELETE FROM public.profiles WHERE user_id = $1";
        client.execute(remove, &[&id(user)]).await.unwrap();
        let removed = position(&client).await;
        let known = server.check("lincoln", user, APPROVE).await;
        assert!(known.is_cached() && known.response.allowed, "{known}");
        let answer = server.try_check(at(&removed)).await.unwrap();
        assert_eq!(answer.said, "deny NOT_A_MEMBER", "{user}");
        assert!(!answer.is_cached() && answer.seq() >= seq(&removed));
        // A good position that the feed has applied needs no more than the cache.
        let answer = server.try_check(at(&known.evidence.position)).await;
        assert!(answer.is_ok_and(|answer| answer.is_cached()));
    }
    let removed = position(&client).await;
    for (read, evidence) in read_all(&server, at(&removed)).await {
        let evidence = evidence.unwrap_or_else(|status| panic!("{read}: {status:?}"));
        assert!(seq(&evidence.position) >= seq(&removed), "{read}");
        assert_eq!(evidence.source(), Source::Database, "{read}");
    }
    proxy.set(Way::Open);
    server.catch_up(&client).await;
    for is_cached in [false, true] {
        let answer = ask(&server, at(&removed)).await.unwrap();
        assert_eq!(answer.said, "deny NOT_A_MEMBER");
        assert_eq!(answer.is_cached(), is_cached, "{answer}");
    }
    server.stop().await;
}

/// The feed is only a moment behind: nobody needs to ask the database.
#[tokio::test]
async fn a_position_that_is_just_committed_is_waited_for() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    eventually("an answer of the cache at a new position", async || {
        server.check("franklin", "bob", APPROVE).await;
        // Of lincoln alone: the other organization's entry stays.
        set_role(&client, "lincoln", "pat", "volunteer").await;
        set_role(&client, "lincoln", "pat", "parent_member").await;
        let asked = CheckPermissionRequest {
            consistency: at(&position(&client).await),
            ..question("franklin", "bob", APPROVE)
        };
        server.try_check(asked).await.unwrap().is_cached()
    })
    .await;
    server.stop().await;
}

/// The service began after them, so only the database can tell; and it is asked once.
#[tokio::test]
async fn positions_from_before_the_service_are_asked_for_once() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let old = position(&client).await;
    set_role(&client, "franklin", "pat", "volunteer").await;
    let older_than_the_service = position(&client).await;
    set_role(&client, "franklin", "pat", "parent_member").await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = start(&proxy.url, &database.url).await;
    server.catch_up(&client).await;
    assert!(ask(&server, at(&old)).await.unwrap().is_cached());
    proxy.set(Way::Closed);
    let answer = ask(&server, at(&old)).await.unwrap();
    assert!(answer.is_cached(), "{answer}");
    // Whether it is ours nobody can say now.
    let status = ask(&server, at(&older_than_the_service)).await.unwrap_err();
    assert_unavailable(&status);
    proxy.set(Way::Open);
    server.stop().await;
}

#[tokio::test]
async fn foreign_positions_are_refused_by_every_read() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let before = position(&client).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = start(&database.url, &proxy.url).await;
    set_role(&client, "lincoln", "pat", "volunteer").await;
    server.catch_up(&client).await;
    let known = position(&client).await;
    let foreign = |position: &str| {
        let (seq, uid) = position.split_once('-').unwrap();
        let uid = u32::from_str_radix(uid, 16).unwrap() ^ 1;
        format!("{seq}-{uid:08x}")
    };
    let beyond = format!("{}-5f0c9ae1", seq(&known) + 1_000_000);
    for is_held_back in [false, true] {
        let mut positions = vec![foreign(&before), foreign(&known), beyond.clone()];
        if is_held_back {
            proxy.set(Way::Silent);
            set_role(&client, "lincoln", "pat", "parent_member").await;
            positions.push(foreign(&position(&client).await));
        }
        for position in positions {
            for (read, outcome) in read_all(&server, at(&position)).await {
                let status = outcome.expect_err(&format!("{read} at {position}"));
                assert_foreign(&status);
                assert!(status.message().contains(&position), "{status:?}");
            }
        }
        // Nothing of it is held against good positions.
        for position in [&before, &known] {
            for (read, outcome) in read_all(&server, at(position)).await {
                outcome.unwrap_or_else(|status| panic!("{read} at {position}: {status:?}"));
            }
        }
    }
    server.stop().await;
}

/// Nobody can tell any more whose it was, and every answer is newer.
#[tokio::test]
async fn a_position_older_than_the_log_holds() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let old = position(&client).await;
    set_role(&client, "lincoln", "bob", "volunteer").await;
    let forget = "DELETE FROM hallpass.log WHERE seq < (SELECT max(seq) FROM hallpass.log)";
    run_sql(&client, forget).await;
    let server = Server::start(config(&database.url)).await;
    for (read, outcome) in read_all(&server, at(&old)).await {
        outcome.unwrap_or_else(|status| panic!("{read}: {status:?}"));
    }
    let answer = ask(&server, at(&old)).await.unwrap();
    assert_eq!(answer.said, "deny ROLE_TOO_LOW", "{answer}");
    server.stop().await;
}

/// Both an old position, that the database was asked about, and a new one, that the feed has read, are lost.
#[tokio::test]
async fn positions_of_a_lost_history_are_refused_and_serving_goes_on() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let kept = position(&client).await;
    for role in ["volunteer", "parent_member"] {
        set_role(&client, "lincoln", "pat", role).await;
    }
    let asked_for = position(&client).await;
    set_role(&client, "franklin", "pat", "volunteer").await;
    set_role(&client, "franklin", "pat", "parent_member").await;
    let server = Server::start(config(&database.url)).await;
    set_role(&client, "lincoln", "pat", "admin").await;
    server.catch_up(&client).await;
    let followed = position(&client).await;
    for position in [&kept, &asked_for, &followed] {
        let answer = ask(&server, at(position)).await.unwrap();
        assert!(answer.is_cached(), "{answer}");
    }
    let undo = "UPDATE public.profiles SET role = 'parent_member' WHERE user_id = :pat";
    // More commits than were lost: the numbers are all there again.
    let then = "UPDATE public.profiles SET role = 'admin' WHERE user_id = :cam;
            UPDATE public.profiles SET role = 'volunteer' WHERE user_id = :cam;"
        .repeat(10);
    fail_over(&client, seq(&kept), undo, &then).await;
    assert!(seq(&position(&client).await) > seq(&followed));
    // From the very moment of the failover on, whether the feed has noticed or not.
    for round in 0..20 {
        for lost in [&asked_for, &followed] {
            match ask(&server, at(lost)).await {
                Err(status) if status.code() == Code::Unavailable => {}
                Err(status) => assert_foreign(&status),
                // An answer of the cache that is as old as it says is from before the failover.
                Ok(answer) => assert!(round == 0 || answer.is_cached(), "{answer}"),
            }
        }
        let new = position(&client).await;
        let answer = ask(&server, at(&new)).await;
        assert!(answer.is_ok_and(|answer| answer.seq() >= seq(&new)));
    }
    server.catch_up(&client).await;
    for lost in [&asked_for, &followed] {
        for (read, outcome) in read_all(&server, at(lost)).await {
            assert_foreign(&outcome.expect_err(read));
        }
    }
    for position in [&kept, &position(&client).await] {
        for (read, outcome) in read_all(&server, at(position)).await {
            outcome.unwrap_or_else(|status| panic!("{read}: {status:?}"));
        }
    }
    server.stop().await;
}

/// Past the service's own bound, and past the time in which the log must have been inspected.
#[tokio::test]
async fn a_caller_who_chooses_to_lives_through_an_outage() {
    const CHOSEN: Duration = Duration::from_secs(8);
    let database = Database::create().await;
    fill(&database.client().await).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let mut config = config(&proxy.url);
    config.staleness_bound = Duration::from_millis(500);
    // An inspection is overdue after six seconds.
    config.inspection_interval = Duration::from_millis(50);
    let server = Server::start(config).await;
    proxy.set(Way::Closed);
    eventually("nobody else is answered", async || {
        ask(&server, None).await.is_err()
    })
    .await;
    let status = ask(&server, within(Duration::from_millis(1))).await;
    assert_unavailable(&status.unwrap_err());
    let mut oldest = Duration::ZERO;
    let status = loop {
        match ask(&server, within(CHOSEN)).await {
            Ok(answer) => {
                assert!(answer.is_cached(), "{answer}");
                assert!(answer.staleness() <= CHOSEN, "{answer}");
                oldest = oldest.max(answer.staleness());
            }
            Err(status) => break status,
        }
        tokio::task::yield_now().await;
    };
    assert_unavailable(&status);
    assert!(oldest > CHOSEN * 9 / 10, "{oldest:?}");
    // What is not cached has no answer, and what must be fresh neither.
    for outcome in [
        ask(&server, within(Duration::ZERO)).await,
        ask(&server, requirement(Requirement::FullyConsistent(true))).await,
    ] {
        assert_unavailable(&outcome.unwrap_err());
    }
    proxy.set(Way::Open);
    eventually("the cache answers again", async || {
        let answer = ask(&server, None).await;
        answer.is_ok_and(|answer| answer.is_cached())
    })
    .await;
    server.stop().await;
}
