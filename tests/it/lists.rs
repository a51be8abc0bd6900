//! Holders of a permission, organizations of a user, counts of an organization: each against the oracle, page by page,
//! and while tables are emptied and refilled.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use hallpass_client::{
    tonic::{Code, Status, transport::Channel},
    v1::{
        Consistency, Evidence, GetOrganizationSummaryRequest, ListPermissionHoldersRequest,
        ListUserOrganizationsRequest, OrganizationSummary, Reason, Source,
        permission_service_client::PermissionServiceClient,
    },
};
use tokio_postgres::Client;
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    database::{Database, eventually},
    deadlines::{TableLock, WAITING},
    limits::{assert_is_decent, wrong_fields},
    names::{NO_ORGANIZATION, Names, id},
    oracle::{Question, World},
    scenarios::{REFRESH_INTERVAL, run_all},
    server::{
        APPROVE, MEMBERS, ORGANIZATIONS, Server, config, fill, head, run_sql, seq, set_role, within,
    },
    service::Freshness,
    sql::{lines, run, value, wait_until},
};

const REFRESH: &str = "SELECT public.refresh_permission_materialized_views()";

const EITHER: [Freshness; 2] = [Freshness::MinimizeLatency, Freshness::FullyConsistent];

const PATIENCE: Duration = Duration::from_secs(5);

/// (user, role, reason), or (organization, role, nothing).
type Listed = (Uuid, String, String);

/// One page: what is listed, the next token, the evidence.
type Page = (Vec<Listed>, String, Evidence);

/// What is asked for page by page.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Query {
    Holders {
        organization: String,
        permission: String,
    },
    Organizations {
        user: String,
    },
}

impl Query {
    fn holders(organization: &str, permission: &str) -> Self {
        Self::Holders {
            organization: id(organization).to_string(),
            permission: permission.to_owned(),
        }
    }

    fn organizations(user: &str) -> Self {
        Self::Organizations {
            user: id(user).to_string(),
        }
    }
}

async fn page(
    channel: &Channel,
    query: &Query,
    (page_size, page_token): (i32, &str),
    consistency: Option<Consistency>,
) -> Result<Page, Status> {
    let mut client = PermissionServiceClient::new(channel.clone());
    let page_token = page_token.to_owned();
    match query.clone() {
        Query::Holders {
            organization,
            permission,
        } => {
            let request = ListPermissionHoldersRequest {
                organization_id: organization,
                permission,
                page_size,
                page_token,
                consistency,
            };
            let page = client.list_permission_holders(request).await?.into_inner();
            let listed = page.holders.iter().map(|holder| {
                let reason = holder.reason().as_str_name().trim_start_matches("REASON_");
                (
                    uuid(&holder.user_id),
                    holder.role.clone(),
                    reason.to_owned(),
                )
            });
            Ok((
                listed.collect(),
                page.next_page_token,
                page.evidence.unwrap(),
            ))
        }
        Query::Organizations { user } => {
            let request = ListUserOrganizationsRequest {
                user_id: user,
                page_size,
                page_token,
                consistency,
            };
            let page = client.list_user_organizations(request).await?.into_inner();
            let listed = page
                .organizations
                .into_iter()
                .map(|row| (uuid(&row.organization_id), row.role, String::new()));
            Ok((
                listed.collect(),
                page.next_page_token,
                page.evidence.unwrap(),
            ))
        }
    }
}

fn uuid(text: &str) -> Uuid {
    assert_eq!(text.len(), 36);
    text.parse().unwrap()
}

/// All pages, one after the other. Each but the last is full, and the database's.
async fn pages(channel: &Channel, query: &Query, size: i32, freshness: Freshness) -> Vec<Page> {
    let mut pages: Vec<Page> = Vec::new();
    let mut token = String::new();
    loop {
        let got = page(channel, query, (size, &token), Some(freshness.into()))
            .await
            .unwrap();
        assert_eq!(got.2.source(), Source::Database);
        token.clone_from(&got.1);
        if !token.is_empty() && size > 0 {
            assert_eq!(got.0.len(), usize::try_from(size).unwrap());
        }
        pages.push(got);
        assert!(pages.len() < 1_000, "pages without end");
        if token.is_empty() {
            return pages;
        }
    }
}

async fn whole(channel: &Channel, query: &Query, size: i32, freshness: Freshness) -> Vec<Listed> {
    let pages = pages(channel, query, size, freshness).await;
    pages.into_iter().flat_map(|page| page.0).collect()
}

async fn summary(
    channel: &Channel,
    organization: &str,
    freshness: Freshness,
) -> Result<(OrganizationSummary, Evidence), Status> {
    let request = GetOrganizationSummaryRequest {
        organization_id: id(organization).to_string(),
        consistency: Some(freshness.into()),
    };
    let mut client = PermissionServiceClient::new(channel.clone());
    let response = client.get_organization_summary(request).await?.into_inner();
    Ok((response.summary.unwrap(), response.evidence.unwrap()))
}

/// Every member whom the oracle allows, by id.
fn expected_holders(world: &World, organization: &str, permission: &str) -> Vec<Listed> {
    let members = world
        .members
        .iter()
        .filter(|((of, _), _)| of == organization);
    let mut holders: Vec<Listed> = members
        .filter_map(|((_, user), role)| {
            let decision = world.decide(&Question {
                organization: organization.to_owned(),
                user: user.clone(),
                permission: permission.to_owned(),
            });
            let role = role.clone().unwrap_or_default();
            (decision.allowed).then(|| (id(user), role, decision.reason.to_owned()))
        })
        .collect();
    holders.sort();
    holders
}

fn expected_organizations(world: &World, user: &str) -> Vec<Listed> {
    let mut organizations: Vec<Listed> = world
        .memberships(user)
        .map(|(organization, role)| {
            (
                id(organization),
                role.unwrap_or_default().to_owned(),
                String::new(),
            )
        })
        .collect();
    organizations.sort();
    organizations
}

/// What the oracle's world does not have: organizations by id with their names, and when each setting was written.
struct Outside {
    names: BTreeMap<Uuid, String>,
    updates: Vec<(Uuid, String, SystemTime)>,
}

impl Outside {
    async fn read(client: &Client) -> Self {
        let names = "SELECT id, name FROM public.organizations";
        let updates =
            "SELECT org_id, permission_key, updated_at FROM public.organization_permissions";
        let rows = client.query(names, &[]).await.unwrap();
        let names = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let rows = client.query(updates, &[]).await.unwrap();
        let updates = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2)));
        Self {
            names,
            updates: updates.collect(),
        }
    }
}

/// The counts, one by one; `None` where there is no such organization.
fn expected_summary(
    world: &World,
    outside: &Outside,
    organization: &str,
) -> Option<OrganizationSummary> {
    let organization_name = outside.names.get(&id(organization))?.clone();
    let mut counts = OrganizationSummary {
        organization_id: id(organization).to_string(),
        organization_name,
        ..OrganizationSummary::default()
    };
    for permission in world.catalog.keys() {
        counts.total_available_permissions += 1;
        let setting = (organization.to_owned(), permission.clone());
        let Some(setting) = world.overrides.get(&setting) else {
            continue;
        };
        counts.total_custom_permissions += 1;
        if setting.enabled == Some(false) {
            counts.disabled_custom_permissions += 1;
        } else {
            counts.enabled_custom_permissions += 1;
        }
        match setting.min_role.as_deref() {
            Some("admin") => counts.admin_only_permissions += 1,
            Some("board_member") => counts.board_member_permissions += 1,
            Some("committee_lead") => counts.committee_lead_permissions += 1,
            Some("volunteer") => counts.volunteer_permissions += 1,
            _ => {}
        }
    }
    counts.last_permission_update = outside
        .updates
        .iter()
        .filter(|(of, permission, _)| {
            *of == id(organization) && world.catalog.contains_key(permission)
        })
        .map(|(_, _, at)| (*at).into())
        .max_by_key(|at: &prost_types::Timestamp| (at.seconds, at.nanos));
    Some(counts)
}

/// A line for each list and each summary that is not the oracle's.
async fn disagreements(
    channel: &Channel,
    world: &World,
    outside: &Outside,
    names: &Names,
    freshness: Freshness,
    size: i32,
) -> Vec<String> {
    let mut expected: Vec<(Query, Vec<Listed>)> = Vec::new();
    for organization in &names.organizations {
        for permission in &names.permissions {
            expected.push((
                Query::holders(organization, permission),
                expected_holders(world, organization, permission),
            ));
        }
    }
    for user in &names.users {
        expected.push((
            Query::organizations(user),
            expected_organizations(world, user),
        ));
    }
    let asked = (expected.iter()).map(|(query, _)| whole(channel, query, size, freshness));
    let mut found: Vec<String> = join_all(asked)
        .await
        .into_iter()
        .zip(&expected)
        .filter(|(said, (_, expected))| said != expected)
        .map(|(said, (query, expected))| {
            format!("{query:?}: says {said:?}, the oracle {expected:?}")
        })
        .collect();
    for organization in &names.organizations {
        let said = match summary(channel, organization, freshness).await {
            Ok((said, evidence)) => {
                assert_eq!(evidence.source(), Source::Database);
                Some(said)
            }
            Err(status) => {
                assert_eq!(status.code(), Code::NotFound, "{status:?}");
                None
            }
        };
        let expected = expected_summary(world, outside, organization);
        if said != expected {
            found.push(format!(
                "{organization} {freshness:?}: says {said:?}, counted {expected:?}"
            ));
        }
    }
    found
}

#[tokio::test]
async fn lists_and_counts_are_the_oracle_s_in_every_scenario() {
    lists_and_counts(&Database::create().await).await;
}

pub(crate) async fn lists_and_counts(database: &Database) {
    let server = Server::start(hallpass::server::Config {
        matrix_refresh_interval: REFRESH_INTERVAL,
        ..config(&database.url)
    })
    .await;
    let channel = &server.channel;
    run_all(database, async |run, world| {
        let names = &run.scenario.names;
        let outside = Outside::read(run.client).await;
        // Whole lists of what may be believed, pages of one of what is read afresh; then all of it refreshed.
        for (freshness, size) in [
            (Freshness::FullyConsistent, 1),
            (Freshness::MinimizeLatency, 0),
        ] {
            for line in disagreements(channel, world, &outside, names, freshness, size).await {
                run.fail(line);
            }
        }
        run.client.batch_execute(REFRESH).await.unwrap();
        for organization in names.organizations.iter().filter(|o| *o != NO_ORGANIZATION) {
            let is_true = "SELECT hallpass.summary_is_true($1)";
            let row = run.client.query_one(is_true, &[&id(organization)]).await;
            assert!(row.unwrap().get::<_, bool>(0), "{organization}");
            let believed = summary(channel, organization, Freshness::MinimizeLatency).await;
            let believed = believed.ok().map(|(summary, _)| summary);
            if believed != expected_summary(world, &outside, organization) {
                run.fail(format!("{organization} refreshed: says {believed:?}"));
            }
        }
    })
    .await;
    server.stop().await;
}

/// 23 members beside the five of `fill`, and the last of them in 23 organizations more.
async fn fill_pages(database: &Client) {
    fill(database).await;
    for index in 0..23 {
        set_role(database, "lincoln", &format!("member {index}"), "admin").await;
        let insert = "INSERT INTO public.organizations (id, name) VALUES ($1, $2)";
        let name = format!("organization {index}");
        database
            .execute(insert, &[&id(&name), &name])
            .await
            .unwrap();
        set_role(database, &name, "member 22", "volunteer").await;
    }
    // The ends of the order.
    let ends = "
        INSERT INTO public.profiles (org_id, user_id, role)
        VALUES (:lincoln, '00000000-0000-0000-0000-000000000000', 'admin'),
               (:lincoln, 'ffffffff-ffff-ffff-ffff-ffffffffffff', 'admin')";
    run_sql(database, ends).await;
}

async fn start() -> (Database, Client, Server) {
    let database = Database::create().await;
    let client = database.client().await;
    fill_pages(&client).await;
    let server = Server::start(config(&database.url)).await;
    (database, client, server)
}

#[tokio::test]
async fn pages_of_any_size_make_the_whole_list_once() {
    let (_database, client, server) = start().await;
    let position = head(&client).await;
    // The admin and the board member of `fill`, and all who were added.
    for (query, length) in [
        (Query::holders("lincoln", APPROVE), 2 + 23 + 2),
        (Query::organizations("member 22"), 23 + 1),
        (Query::holders("lincoln", "no_such_permission"), 0),
        (Query::holders(NO_ORGANIZATION, APPROVE), 0),
        (Query::organizations("nobody"), 0),
    ] {
        let list = whole(&server.channel, &query, 0, Freshness::MinimizeLatency).await;
        assert_eq!(list.len(), length, "{query:?}");
        assert!(list.is_sorted() && BTreeSet::from_iter(&list).len() == length);
        for size in (1..=3).chain([26, 27, 28, 1_000, i32::MAX]) {
            for freshness in EITHER {
                let pages = pages(&server.channel, &query, size, freshness).await;
                let size = usize::try_from(size).unwrap();
                assert_eq!(
                    pages.len(),
                    length.div_ceil(size).max(1),
                    "{query:?} by {size}"
                );
                for (_, _, evidence) in &pages {
                    assert_eq!(seq(&evidence.position), position);
                }
                let listed: Vec<Listed> = pages.into_iter().flat_map(|page| page.0).collect();
                assert_eq!(listed, list, "{query:?} by {size}");
            }
        }
    }
    server.stop().await;
}

/// The next page is a later snapshot and says so; what stays is listed once, whatever becomes of the row at its edge.
#[tokio::test]
async fn what_stays_during_the_paging_is_listed_once() {
    let (_database, client, server) = start().await;
    let query = Query::holders("lincoln", APPROVE);
    let before = whole(&server.channel, &query, 0, Freshness::MinimizeLatency).await;
    let (first, token, evidence) = page(&server.channel, &query, (10, ""), None).await.unwrap();
    assert_eq!(first, before[..10]);

    // The next page would have begun with the eleventh.
    let delete = "DELETE FROM public.profiles WHERE user_id = $1";
    client.execute(delete, &[&before[10].0]).await.unwrap();
    let (second, _, later) = page(&server.channel, &query, (1_000, &token), None)
        .await
        .unwrap();
    assert_eq!(second, before[11..]);
    assert!(seq(&later.position) > seq(&evidence.position));
    server.stop().await;
}

#[tokio::test]
async fn a_page_has_100_rows_unless_it_is_told_and_1000_at_most() {
    let (_database, client, server) = start().await;
    let many = "
        INSERT INTO public.profiles (org_id, user_id, role)
        SELECT :franklin, gen_random_uuid(), 'admin' FROM generate_series(1, 1100)";
    run_sql(&client, many).await;
    let query = Query::holders("franklin", "can_edit_user_roles");
    for (size, rows) in [(0, 100), (1_000, 1_000), (1_001, 1_000), (i32::MAX, 1_000)] {
        let (listed, token, _) = page(&server.channel, &query, (size, ""), None)
            .await
            .unwrap();
        assert_eq!(listed.len(), rows, "{size}");
        assert!(!token.is_empty());
    }
    let status = page(&server.channel, &query, (-1, ""), None).await;
    assert_eq!(wrong_fields(&status.unwrap_err()), ["page_size"]);
    server.stop().await;
}

#[tokio::test]
async fn a_token_of_another_query_or_none_is_refused() {
    let (_database, _client, server) = start().await;
    let channel = &server.channel;
    let queries = [
        Query::holders("lincoln", APPROVE),
        Query::holders("franklin", APPROVE),
        Query::holders("lincoln", "can_view_budget"),
        // One id in two kinds of query.
        Query::holders("member 22", APPROVE),
        Query::organizations("member 22"),
        Query::organizations("member 21"),
    ];
    let mut tokens = 0;
    for query in &queries {
        let (_, token, _) = page(channel, query, (1, ""), None).await.unwrap();
        if token.is_empty() {
            continue;
        }
        tokens += 1;
        for other in &queries {
            let answer = page(channel, other, (7, &token), None).await;
            if other == query {
                answer.unwrap();
            } else {
                assert_eq!(
                    wrong_fields(&answer.unwrap_err()),
                    ["page_token"],
                    "{other:?}"
                );
            }
        }
        // An id has one token, however it is spelled.
        if let Query::Holders {
            organization,
            permission,
        } = query
        {
            let spelled = Query::Holders {
                organization: organization.to_uppercase(),
                permission: permission.clone(),
            };
            page(channel, &spelled, (1, &token), None).await.unwrap();
        }
        for garbage in [
            &token[1..],
            &format!("{token}0"),
            "0-0",
            "\u{0}",
            &"é".repeat(100_000),
        ] {
            let status = page(channel, query, (1, garbage), None).await.unwrap_err();
            assert_eq!(wrong_fields(&status), ["page_token"], "{garbage:?}");
        }
    }
    assert_eq!(tokens, 4);
    server.stop().await;
}

#[tokio::test]
async fn malformed_lists_name_every_field_that_is_wrong() {
    let (_database, _client, server) = start().await;
    let channel = &server.channel;
    let holders = Query::Holders {
        organization: "lincoln".to_owned(),
        permission: "x\u{0}".to_owned(),
    };
    let organizations = Query::Organizations {
        user: String::new(),
    };
    let no_requirement = Some(Consistency { requirement: None });
    let status = page(channel, &holders, (-1, "x"), no_requirement.clone()).await;
    assert_eq!(
        wrong_fields(&status.unwrap_err()),
        [
            "organization_id",
            "permission",
            "page_size",
            "page_token",
            "consistency"
        ]
    );
    let status = page(channel, &organizations, (-1, "x"), no_requirement.clone()).await;
    assert_eq!(
        wrong_fields(&status.unwrap_err()),
        ["user_id", "page_size", "page_token", "consistency"]
    );
    let mut client = server.client();
    let mut get = async |organization_id: &str, consistency| {
        let request = GetOrganizationSummaryRequest {
            organization_id: organization_id.to_owned(),
            consistency,
        };
        client.get_organization_summary(request).await.unwrap_err()
    };
    let fields = wrong_fields(&get("x", no_requirement).await);
    assert_eq!(fields, ["organization_id", "consistency"]);

    let unknown = id(NO_ORGANIZATION).to_string();
    let status = get(&unknown, None).await;
    assert_eq!(status.code(), Code::NotFound);
    assert_is_decent(&status);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "ORGANIZATION_NOT_FOUND");

    server.stop().await;
}

/// Everything else would pass if the summary were never read: here the tables change behind its back. A time of update
/// is the table's, since an update of it alone is no change to the log.
#[tokio::test]
async fn a_true_summary_is_what_is_read_unless_it_must_be_fresh() {
    let (_database, client, server) = start().await;
    let custom = async |freshness| {
        let (summary, evidence) = summary(&server.channel, "lincoln", freshness)
            .await
            .unwrap();
        (summary.total_custom_permissions, seq(&evidence.position))
    };
    let setting = "
        INSERT INTO public.organization_permissions (org_id, permission_key, is_enabled)
        VALUES (:lincoln, 'can_view_budget', true)";
    run_sql(&client, setting).await;
    let position = head(&client).await;
    for freshness in EITHER {
        assert_eq!(custom(freshness).await, (1, position), "behind");
    }
    run(&client, REFRESH).await;
    for freshness in EITHER {
        assert_eq!(custom(freshness).await, (1, position), "refreshed");
    }
    let later = "UPDATE public.organization_permissions SET updated_at = '2100-01-01Z'";
    run(&client, later).await;
    assert_eq!(head(&client).await, position, "no change to the log");
    for freshness in EITHER {
        let (summary, _) = summary(&server.channel, "lincoln", freshness)
            .await
            .unwrap();
        assert_eq!(
            summary.last_permission_update.unwrap().seconds,
            4_102_444_800
        );
    }
    run(
        &client,
        "ALTER TABLE public.organization_permissions DISABLE TRIGGER ALL;
         DELETE FROM public.organization_permissions",
    )
    .await;
    assert_eq!(custom(Freshness::MinimizeLatency).await, (1, position));
    assert_eq!(custom(Freshness::FullyConsistent).await, (0, position));
    server.stop().await;
}

/// One of each kind, counted by hand: a role counts where it is an override's own, enabled or not.
#[tokio::test]
async fn roles_are_counted_by_the_overrides_own() {
    const SETTINGS: &str = "
        INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required, is_enabled) VALUES
            (:lincoln, 'can_view_messages', 'admin', true), (:lincoln, 'can_edit_messages', 'admin', false),
            (:lincoln, 'can_send_emails', 'board_member', NULL), (:lincoln, 'can_view_budget', 'volunteer', false),
            (:lincoln, 'can_edit_user_roles', NULL, true), (:lincoln, 'can_view_events', 'teacher', true),
            (:lincoln, 'no_such_permission', 'admin', true)";
    const COUNTS: &str = "
        SELECT org_name, total_available_permissions, total_custom_permissions, enabled_custom_permissions,
               disabled_custom_permissions, admin_only_permissions, board_member_permissions,
               committee_lead_permissions, volunteer_permissions, last_permission_update IS NULL
        FROM $counts ORDER BY org_name DESC";
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    run_sql(&client, SETTINGS).await;
    let counts = async |relation| {
        run(&client, REFRESH).await;
        lines(&client, &COUNTS.replace("$counts", relation)).await
    };
    for relation in ["hallpass.organization_counts", "org_permission_summary"] {
        assert_eq!(
            counts(relation).await,
            [
                "lincoln | 30 | 6 | 4 | 2 | 2 | 1 | 0 | 1 | f",
                "franklin | 30 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | t"
            ]
        );
    }
    run(
        &client,
        "DELETE FROM public.organization_permission_templates",
    )
    .await;
    for relation in ["hallpass.organization_counts", "org_permission_summary"] {
        assert_eq!(
            counts(relation).await,
            [
                "lincoln | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | t",
                "franklin | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | t"
            ]
        );
    }
}

/// Not all organizations are counted to answer for one.
#[tokio::test]
async fn the_counts_of_one_organization_read_its_rows_alone() {
    let database = Database::create().await;
    let client = database.client().await;
    let explain = format!(
        "SET enable_seqscan = off; SET enable_bitmapscan = off;
         EXPLAIN SELECT * FROM hallpass.organization_counts WHERE org_id = '{}'",
        id("lincoln")
    );
    let plan = lines(&client, &explain).await;
    for condition in ["Index Cond: (id = ", "Index Cond: (org_id = "] {
        assert!(
            plan.iter().any(|line| line.contains(condition)),
            "{condition}: {plan:#?}"
        );
    }
}

/// The summary goes by its own stamp and its own file, not by the matrix's.
#[tokio::test]
async fn the_summary_is_believed_where_it_is_the_truth() {
    const CHANGE: &str = "
        INSERT INTO public.organization_permissions (org_id, permission_key) VALUES (:lincoln, 'can_view_budget')
        ON CONFLICT (org_id, permission_key) DO UPDATE SET is_enabled = NOT organization_permissions.is_enabled";
    const CATALOG: &str = "UPDATE public.organization_permission_templates SET permission_name = permission_name || 'x'";
    const MATRIX: &str = "REFRESH MATERIALIZED VIEW public.user_permission_matrix";
    const SUMMARY: &str = "REFRESH MATERIALIZED VIEW public.org_permission_summary";
    const EMPTIED: &str = "REFRESH MATERIALIZED VIEW public.org_permission_summary WITH NO DATA";
    const OLD: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT";
    // A session, what it runs, and for whom it believes the summary then; `-`: it is not asked, which would lock.
    let cases: [&[(char, &str, &str)]; 8] = [
        &[
            ('a', CHANGE, "franklin"),
            ('a', MATRIX, "franklin"),
            ('a', SUMMARY, "lincoln franklin"),
        ],
        &[('a', CATALOG, ""), ('a', REFRESH, "lincoln franklin")],
        &[
            ('a', "BEGIN", "lincoln franklin"),
            ('a', CHANGE, ""),
            ('b', "SELECT", "lincoln franklin"),
            ('a', "ROLLBACK", "lincoln franklin"),
        ],
        &[
            ('a', "BEGIN", "lincoln franklin"),
            ('a', CHANGE, ""),
            ('a', "SET CONSTRAINTS ALL IMMEDIATE", ""),
            ('a', "COMMIT", "franklin"),
        ],
        // A plain refresh puts its rows under older snapshots too.
        &[
            ('a', OLD, "-"),
            ('b', CHANGE, "franklin"),
            ('b', SUMMARY, "lincoln franklin"),
            ('a', "SELECT", ""),
            ('a', "COMMIT", "lincoln franklin"),
        ],
        &[
            ('a', OLD, "lincoln franklin"),
            ('b', CHANGE, "franklin"),
            ('b', REFRESH, "lincoln franklin"),
            ('a', "SELECT", "lincoln franklin"),
            ('a', "COMMIT", "lincoln franklin"),
        ],
        &[('a', EMPTIED, ""), ('a', REFRESH, "lincoln franklin")],
        // Who holds the file is not waited for.
        &[
            ('b', "BEGIN", "lincoln franklin"),
            ('b', SUMMARY, "lincoln franklin"),
            ('a', "SELECT", ""),
            ('b', "COMMIT", "lincoln franklin"),
        ],
    ];
    let database = Database::create().await;
    let (a, b) = (database.client().await, database.client().await);
    fill(&a).await;
    for (index, steps) in cases.iter().enumerate() {
        run(&a, REFRESH).await;
        for (session, sql, believed) in *steps {
            let session = if *session == 'a' { &a } else { &b };
            run_sql(session, sql).await;
            if *believed == "-" {
                continue;
            }
            let mut found = Vec::new();
            for organization in ORGANIZATIONS {
                let is_true = format!("SELECT hallpass.summary_is_true('{}')", id(organization));
                if value(session, &is_true).await == "t" {
                    found.push(organization);
                }
                let [believing, live] = [true, false].map(|believe| {
                    let id = id(organization);
                    format!("SELECT s::text FROM hallpass.organization_summary_in_snapshot('{id}', {believe}) s")
                });
                assert_eq!(
                    lines(session, &believing).await,
                    lines(session, &live).await
                );
            }
            assert_eq!(found.join(" "), *believed, "case {index}: {sql}");
        }
    }
}

/// Runs `reload` in a transaction, asks while it holds its locks, and ends it: the answer must be the one from before.
async fn asked_while_reloaded<T: PartialEq + std::fmt::Debug>(
    database: &Database,
    reload: &str,
    ask: impl AsyncFn() -> T,
) {
    let (client, observer) = (database.client().await, database.client().await);
    let before = ask().await;
    run_sql(&client, &format!("BEGIN; {reload}")).await;
    let commit = async {
        eventually("the list waits for the lock", async || {
            let row = observer.query_one(WAITING, &[]).await;
            row.unwrap().get::<_, i32>(0) > 0
        })
        .await;
        run(&client, "COMMIT").await;
    };
    let both = futures_util::future::join(ask(), commit);
    let (after, ()) = within("an answer after the reload", PATIENCE, both).await;
    assert_eq!(after, before, "{reload}");
}

/// TRUNCATE empties a table for older snapshots too: a list that waits for a reload must not see the hole.
#[tokio::test]
async fn a_list_that_waited_for_a_reload_sees_it_whole() {
    const RELOAD: &str = "
        CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM public.$table;
        TRUNCATE public.$table;
        INSERT INTO public.$table SELECT * FROM kept";
    const RELOAD_ORGANIZATIONS: &str = "
        CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM public.organizations;
        CREATE TEMP TABLE kept_settings ON COMMIT DROP AS SELECT * FROM public.organization_permissions;
        CREATE TEMP TABLE kept_profiles ON COMMIT DROP AS SELECT * FROM public.profiles;
        TRUNCATE public.organizations CASCADE;
        INSERT INTO public.organizations SELECT * FROM kept;
        INSERT INTO public.organization_permissions SELECT * FROM kept_settings;
        INSERT INTO public.profiles SELECT * FROM kept_profiles";
    let (database, client, server) = start().await;
    // Without it the admins hold the permission.
    let disabled = "
        INSERT INTO public.organization_permissions (org_id, permission_key, is_enabled)
        VALUES (:lincoln, 'can_view_budget', false)";
    run_sql(&client, disabled).await;
    let channel = &server.channel;
    for table in [
        "profiles",
        "organization_permissions",
        "organization_permission_templates",
        "permission_roles",
    ] {
        let reload = RELOAD.replace("$table", table);
        for permission in [APPROVE, "can_view_budget"] {
            let query = Query::holders("lincoln", permission);
            let ask = async || whole(channel, &query, 0, Freshness::MinimizeLatency).await;
            asked_while_reloaded(&database, &reload, ask).await;
        }
    }
    for reload in [&RELOAD.replace("$table", "profiles"), RELOAD_ORGANIZATIONS] {
        let query = Query::organizations("member 22");
        let ask = async || whole(channel, &query, 0, Freshness::MinimizeLatency).await;
        asked_while_reloaded(&database, reload, ask).await;
    }
    for reload in [
        &RELOAD.replace("$table", "organization_permissions"),
        RELOAD_ORGANIZATIONS,
    ] {
        for freshness in EITHER {
            let ask = async || summary(channel, "lincoln", freshness).await.unwrap().0;
            asked_while_reloaded(&database, reload, ask).await;
        }
    }
    server.stop().await;
}

/// However many lists are under way, a check that misses finds a connection.
#[tokio::test]
async fn lists_leave_half_of_the_pool_to_checks() {
    const BOTH_WAIT: &str = "
        SELECT count(*) FILTER (WHERE query LIKE '%hallpass.user_organizations(%') = 4
           AND count(*) FILTER (WHERE query LIKE '%hallpass.load(%') = 1
        FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let (database, client, server) = start().await;
    let lock = TableLock::take(&database, "public.profiles").await;
    let query = Query::organizations(MEMBERS[0].0);
    let asked = (0..50).map(|_| page(&server.channel, &query, (0, ""), None));
    let check = async {
        wait_until(&client, &format!("SELECT ({WAITING}) >= 4")).await;
        server.check_now("lincoln", "ann", APPROVE).await
    };
    let observer = &client;
    let release = async move {
        wait_until(observer, BOTH_WAIT).await;
        lock.release();
    };
    let all = futures_util::future::join3(join_all(asked), check, release);
    let (answers, check, ()) = within("all answers", PATIENCE, all).await;
    assert_eq!(check.said, "allow GRANTED_BY_ROLE");
    for answer in answers {
        match answer {
            Ok((listed, ..)) => assert_eq!(listed.len(), ORGANIZATIONS.len()),
            // On a machine so busy that its turn did not come in time.
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
        }
    }
    server.stop().await;
}

/// What a list of holders says is what a check says.
#[tokio::test]
async fn a_holder_is_listed_with_the_reason_of_the_check() {
    let (_database, client, server) = start().await;
    let named = "
        INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required, specific_users)
        VALUES (:franklin, 'can_approve_expenses', 'admin', ARRAY[:vic, :ann, :eve])";
    run_sql(&client, named).await;
    let query = Query::holders("franklin", APPROVE);
    let listed = whole(&server.channel, &query, 0, Freshness::MinimizeLatency).await;
    let mut expected = vec![
        (id("ann"), "admin".to_owned(), "GRANTED_BY_ROLE".to_owned()),
        (
            id("vic"),
            "volunteer".to_owned(),
            "GRANTED_TO_USER".to_owned(),
        ),
    ];
    expected.sort();
    assert_eq!(listed, expected);
    for (user, reason) in [
        ("ann", Reason::GrantedByRole),
        ("vic", Reason::GrantedToUser),
    ] {
        let answer = server.check_now("franklin", user, APPROVE).await;
        assert_eq!(answer.response.reason(), reason);
    }
    server.stop().await;
}
