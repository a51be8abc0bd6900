//! Who is let in with an API key, to ask about what, and until when.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use hallpass::{
    auth::api_key::Pepper,
    store::api_keys::{KeysError, NewKey},
};
use hallpass_client::{
    tonic::{Code, Status},
    v1::{
        BatchCheckPermissionsItem, BatchCheckPermissionsRequest, CheckPermissionRequest,
        GetOrganizationSummaryRequest, ListPermissionHoldersRequest, ListUserOrganizationsRequest,
        ListUserPermissionsRequest, batch_check_permissions_result::Result as ItemResult,
    },
};
use tokio::join;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{
    database::{Database, as_role, connect, eventually},
    keyring::{
        CHECK, Made, TIMING, call, client_with, config_with_keys, key_id, manager, refusal, revoke,
        with_key,
    },
    names::id,
    server::{APPROVE, Server, fill, question},
    sql::{pid, run, sqlstate, value, wait_until, wait_until_blocked},
};

fn pepper() -> Pepper {
    Pepper::new(b"the service's own, and nobody else's".to_vec())
}

async fn start(url: &str) -> Server {
    Server::start(config_with_keys(url, TIMING, Pepper::default())).await
}

async fn until_said(server: &Server, key: &str, expected: &str) {
    eventually(&format!("the key is answered `{expected}`"), async || {
        with_key(server, key).await == expected
    })
    .await;
}

#[tokio::test]
async fn a_credential_is_a_key_of_this_database_or_none() {
    let (database, other) = join!(Database::create(), Database::create());
    let url = &database.url;
    let key = Made::default().make(url).await;
    let expired = Made::expired().make(url).await;
    let revoked = Made::default().make(url).await;
    revoke(url, &revoked).await;
    let elsewhere = Made::default().make(&other.url).await;
    let server = start(url).await;

    let bearer = |key: &str| format!("Bearer {key}");
    let with_secret_of = |id: &str, secret: &str| {
        let secret = secret.rsplit('_').next().unwrap();
        bearer(&format!("hp_{}_{secret}", key_id(id)))
    };
    let said = async |authorization: &[&str]| {
        call(&server.channel, CHECK, authorization)
            .await
            .unwrap_err()
    };
    for let_in in [
        bearer(&key),
        format!("bearer {key}"),
        format!("BEARER  {key} "),
    ] {
        assert_eq!(
            said(&[&let_in]).await.code(),
            Code::InvalidArgument,
            "{let_in}"
        );
    }
    let reason = |status: Status| refusal(&Err(status));
    assert_eq!(reason(said(&[]).await), "CREDENTIAL_MISSING");
    assert_eq!(
        reason(said(&[&bearer(&expired)]).await),
        "CREDENTIAL_EXPIRED"
    );
    assert_eq!(
        reason(said(&[&bearer(&revoked)]).await),
        "CREDENTIAL_REVOKED"
    );

    // Nothing tells these apart: not a key that exists from one that does not, nor one that was good once.
    let invalid = [
        bearer(&elsewhere),
        with_secret_of(&key, &expired),
        with_secret_of(&expired, &key),
        with_secret_of(&revoked, &key),
        bearer(&key.to_uppercase()),
        bearer(&key[..key.len() - 1]),
        bearer("hp_"),
        bearer("hp__"),
        bearer("eyJhbGciOiJub25lIn0.e30."),
        bearer(""),
        "Bearer".to_owned(),
        format!("Basic {key}"),
        key.clone(),
    ];
    let first = said(&[&invalid[0]]).await;
    assert_eq!(reason(first.clone()), "CREDENTIAL_INVALID");
    for invalid in &invalid {
        let status = said(&[invalid]).await;
        assert_eq!(format!("{status:?}"), format!("{first:?}"), "{invalid}");
    }
    let twice = said(&[&bearer(&key), &bearer(&key)]).await;
    assert_eq!(format!("{twice:?}"), format!("{first:?}"));
}

#[tokio::test]
async fn a_row_is_no_key_without_the_pepper_nor_under_another_id() {
    let database = Database::create().await;
    let url = &database.url;
    let key = Made {
        pepper: pepper(),
        ..Made::default()
    }
    .make(url)
    .await;
    // What somebody makes who can write the table and does not have the pepper.
    let forged = Made::default().make(url).await;
    let victim = Made {
        pepper: pepper(),
        ..Made::default()
    }
    .make(url)
    .await;
    let copy = format!(
        "UPDATE hallpass.api_keys SET hash = (SELECT hash FROM hallpass.api_keys WHERE id = '{}') WHERE id = '{}'",
        key_id(&key),
        key_id(&victim)
    );
    run(&database.client().await, &copy).await;
    let server = Server::start(config_with_keys(url, TIMING, pepper())).await;
    assert_eq!(with_key(&server, &key).await, "");
    assert_eq!(with_key(&server, &forged).await, "CREDENTIAL_INVALID");
    let copied = key.replace(key_id(&key), key_id(&victim));
    assert_eq!(with_key(&server, &copied).await, "CREDENTIAL_INVALID");
}

/// Keys are made, changed, removed and expire while the service runs.
#[tokio::test]
async fn every_change_of_the_keys_is_seen() {
    let database = Database::create().await;
    let url = &database.url;
    let client = database.client().await;
    let server = start(url).await;
    let key = Made {
        scopes: vec!["list"],
        ..Made::default()
    }
    .make(url)
    .await;
    let id = key_id(&key);
    until_said(&server, &key, "SCOPE_MISSING").await;
    let changes = [
        ("UPDATE hallpass.api_keys SET scopes = '{check,list}'", ""),
        (
            "UPDATE hallpass.api_keys SET expires_at = now() + interval '1 ms'",
            "CREDENTIAL_EXPIRED",
        ),
        (
            "UPDATE hallpass.api_keys SET expires_at = now() + interval '1 h'",
            "",
        ),
        (
            "UPDATE hallpass.api_keys SET expires_at = now() + interval '700 ms'",
            "CREDENTIAL_EXPIRED",
        ),
        ("UPDATE hallpass.api_keys SET expires_at = NULL", ""),
        ("DELETE FROM hallpass.api_keys", "CREDENTIAL_INVALID"),
    ];
    for (change, expected) in changes {
        let row = format!("{change} WHERE id = '{id}'");
        run(&client, &row).await;
        until_said(&server, &key, expected).await;
    }
    let key = Made::default().make(url).await;
    until_said(&server, &key, "").await;
    run(&client, "TRUNCATE hallpass.api_keys CASCADE").await;
    until_said(&server, &key, "CREDENTIAL_INVALID").await;
}

/// A revocation is heard of within the bound while calls come all the time, and costs the other key none of its calls.
#[tokio::test]
async fn a_key_that_is_revoked_under_load_ends_within_the_bound_and_alone() {
    let database = Database::create().await;
    let url = &database.url;
    fill(&database.client().await).await;
    let (leaving, staying) = (
        Made::default().make(url).await,
        Made::default().make(url).await,
    );
    let server = start(url).await;
    let is_over = AtomicBool::new(false);

    let stay = async {
        let mut client = client_with(&server, &staying);
        let mut answered = 0;
        while !is_over.load(Ordering::Relaxed) {
            let asked = client
                .check_permission(question("lincoln", "bob", APPROVE))
                .await;
            assert!(asked.unwrap().into_inner().allowed);
            answered += 1;
        }
        answered
    };
    let leave = async {
        let mut client = client_with(&server, &leaving);
        let allowed = client
            .check_permission(question("lincoln", "bob", APPROVE))
            .await;
        assert!(allowed.unwrap().into_inner().allowed);
        revoke(url, &leaving).await;
        let revoked = Instant::now();
        loop {
            let asked = Instant::now();
            match client
                .check_permission(question("lincoln", "bob", APPROVE))
                .await
            {
                Ok(_) => assert!(asked.duration_since(revoked) <= TIMING.staleness_bound),
                Err(status) => {
                    assert_eq!(refusal(&Err(status)), "CREDENTIAL_REVOKED");
                    break;
                }
            }
        }
        is_over.store(true, Ordering::Relaxed);
    };
    let (answered, ()) = join!(stay, leave);
    assert!(answered > 10, "{answered}");
}

/// Every call about an organization, made with a key.
async fn refusals(server: &Server, key: &str, organization: Uuid) -> Vec<String> {
    let organization_id = organization.to_string();
    let user_id = id("bob").to_string();
    let permission = APPROVE.to_owned();
    let mut client = client_with(server, key);
    let check = |explain| CheckPermissionRequest {
        organization_id: organization_id.clone(),
        user_id: user_id.clone(),
        permission: permission.clone(),
        explain,
        consistency: None,
    };
    let mut said = Vec::new();
    for explain in [false, true] {
        said.push(client.check_permission(check(explain)).await.map(drop));
    }
    let list = ListUserPermissionsRequest {
        organization_id: organization_id.clone(),
        user_id: user_id.clone(),
        ..Default::default()
    };
    said.push(client.list_user_permissions(list).await.map(drop));
    let holders = ListPermissionHoldersRequest {
        organization_id: organization_id.clone(),
        permission: permission.clone(),
        ..Default::default()
    };
    said.push(client.list_permission_holders(holders).await.map(drop));
    let summary = GetOrganizationSummaryRequest {
        organization_id: organization_id.clone(),
        ..Default::default()
    };
    said.push(client.get_organization_summary(summary).await.map(drop));
    let mut refusals: Vec<String> = said
        .into_iter()
        .map(|said| match said {
            Ok(()) => "answered".to_owned(),
            Err(status) => format!(
                "{:?} {:?} {:?}",
                status.code(),
                status.message(),
                status.details()
            ),
        })
        .collect();
    let batch = BatchCheckPermissionsRequest {
        items: vec![BatchCheckPermissionsItem {
            organization_id,
            user_id,
            permission,
        }],
        consistency: None,
    };
    let batch = client
        .batch_check_permissions(batch)
        .await
        .unwrap()
        .into_inner();
    refusals.extend(
        batch
            .results
            .into_iter()
            .map(|result| match result.result.unwrap() {
                ItemResult::Answer(_) => "answered".to_owned(),
                ItemResult::Error(error) => format!("{error:?}"),
            }),
    );
    refusals
}

#[tokio::test]
async fn a_limited_key_hears_the_same_of_every_other_organization_whether_it_exists_or_not() {
    let database = Database::create().await;
    let url = &database.url;
    fill(&database.client().await).await;
    let limited = Made {
        organizations: Some(vec![id("lincoln")]),
        ..Made::default()
    };
    let key = limited.make(url).await;
    let server = start(url).await;
    assert_eq!(
        refusals(&server, &key, id("lincoln")).await,
        ["answered"; 6]
    );
    let existing = refusals(&server, &key, id("franklin")).await;
    assert_eq!(existing.len(), 6);
    for refusal in &existing {
        assert!(
            refusal.contains("the credential is not for this organization"),
            "{refusal}"
        );
        assert!(!refusal.contains(&id("franklin").to_string()));
    }
    for missing in [id("nowhere"), Uuid::nil(), Uuid::max()] {
        assert_eq!(refusals(&server, &key, missing).await, existing);
    }
}

/// A user's memberships are listed as far as the key goes, over pages, as if there were no others.
#[tokio::test]
async fn a_limited_key_lists_its_own_organizations_alone() {
    const ORGANIZATIONS: usize = 20;
    let database = Database::create().await;
    let url = &database.url;
    let client = database.client().await;
    let names: Vec<String> = (0..ORGANIZATIONS)
        .map(|index| format!("organization {index}"))
        .collect();
    for name in &names {
        insert_member(&client, name).await;
    }
    let mut visible: Vec<Uuid> = names.iter().step_by(3).map(|name| id(name)).collect();
    visible.sort_unstable();
    let limited = Made {
        organizations: Some(visible.clone()),
        ..Made::default()
    };
    let key = limited.make(url).await;
    let server = start(url).await;
    let mut api = client_with(&server, &key);
    let (mut listed, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListUserOrganizationsRequest {
            user_id: id("bob").to_string(),
            page_size: 2,
            page_token,
            ..Default::default()
        };
        let page = api
            .list_user_organizations(request)
            .await
            .unwrap()
            .into_inner();
        listed.extend(
            page.organizations
                .iter()
                .map(|o| o.organization_id.parse::<Uuid>().unwrap()),
        );
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        assert_eq!(page.organizations.len(), 2);
    }
    assert_eq!(listed, visible);
}

async fn insert_member(client: &Client, organization: &str) {
    let insert = "INSERT INTO public.organizations (id, name) VALUES ($1, $2)";
    client
        .execute(insert, &[&id(organization), &organization])
        .await
        .unwrap();
    let insert = "INSERT INTO public.profiles (org_id, user_id, role) VALUES ($1, $2, 'volunteer')";
    client
        .execute(insert, &[&id(organization), &id("bob")])
        .await
        .unwrap();
}

#[tokio::test]
async fn the_last_use_of_a_key_is_recorded() {
    let database = Database::create().await;
    let url = &database.url;
    let client = database.client().await;
    let (used, refused) = (
        Made::default().make(url).await,
        Made::default().make(url).await,
    );
    revoke(url, &refused).await;
    let server = start(url).await;
    assert_eq!(with_key(&server, &used).await, "");
    assert_eq!(with_key(&server, &refused).await, "CREDENTIAL_REVOKED");
    let last_use = format!(
        "SELECT now() - last_used_at BETWEEN '0 s' AND '20 s' FROM hallpass.api_key_use WHERE key_id = '{}'
         UNION ALL SELECT false LIMIT 1",
        key_id(&used)
    );
    wait_until(&client, &last_use).await;
    // It stays the latest, whatever a replica says that lags.
    let id = key_id(&used);
    run(
        &client,
        &format!("SELECT hallpass.record_api_key_use('{{{id},{id},gone}}', '{{3600,7200,1}}')"),
    )
    .await;
    assert_eq!(value(&client, &last_use).await, "t");
    assert_eq!(
        value(&client, "SELECT count(*) FROM hallpass.api_key_use").await,
        "1"
    );
}

#[tokio::test]
async fn the_service_s_login_makes_changes_and_revokes_no_key() {
    let database = Database::create().await;
    Made::default().make(&database.url).await;
    let service = connect(&as_role(&database.url, "hallpass_service")).await;
    for refused in [
        "INSERT INTO hallpass.api_keys SELECT * FROM hallpass.api_keys",
        "UPDATE hallpass.api_keys SET scopes = '{admin}'",
        "UPDATE hallpass.api_keys SET revoked_at = NULL",
        "DELETE FROM hallpass.api_keys",
        "TRUNCATE hallpass.api_keys",
        "UPDATE hallpass.api_keys_edition SET edition = gen_random_uuid()",
        "DELETE FROM hallpass.api_key_use",
        "SELECT hallpass.api_keys_changed()",
    ] {
        let error = service.batch_execute(refused).await.expect_err(refused);
        assert_eq!(sqlstate(&error), "42501", "{refused}");
    }
    let auditor = connect(&as_role(&database.url, "hallpass_auditor")).await;
    let error = auditor
        .batch_execute("SELECT hash FROM hallpass.api_keys")
        .await;
    assert_eq!(sqlstate(&error.unwrap_err()), "42501");
}

/// The edition is drawn by the last to commit, so none stands for keys that it does not have.
#[tokio::test]
async fn changes_of_keys_come_one_after_the_other() {
    let database = Database::create().await;
    let (first, second) = join!(database.client(), database.client());
    let (one, two) = join!(
        Made::default().make(&database.url),
        Made::default().make(&database.url)
    );
    let edition = "SELECT edition FROM hallpass.api_keys_edition";
    let before = value(&first, edition).await;
    let revoke = |key: &str| {
        format!(
            "UPDATE hallpass.api_keys SET revoked_at = now() WHERE id = '{}'",
            key_id(key)
        )
    };
    run(&first, &format!("BEGIN; {}", revoke(&one))).await;
    let (holder, waiting) = (pid(&first).await, pid(&second).await);
    let statement = revoke(&two);
    let later = tokio::spawn(async move { second.batch_execute(&statement).await });
    let watcher = database.client().await;
    wait_until_blocked(&watcher, waiting, holder).await;
    assert_eq!(value(&watcher, edition).await, before);
    run(&first, "COMMIT").await;
    later.await.unwrap().unwrap();
    assert_ne!(value(&watcher, edition).await, before);
}

/// As many keys as there may be are read; beyond, none can be made until one goes.
#[tokio::test]
async fn keys_are_bounded() {
    let database = Database::create().await;
    let url = &database.url;
    let client = database.client().await;
    let key = Made::default().make(url).await;
    run(
        &client,
        "INSERT INTO hallpass.api_keys (id, hash, name, scopes, created_at)
         SELECT 'abcdefghijkl' || translate(lpad(n::text, 4, '0'), '0189', 'abcd'), sha256(n::text::bytea), n, '{check}',
                now() + interval '1 s'
         FROM generate_series(1, 9999) n",
    )
    .await;
    let one_more = || NewKey {
        id: "aaaaaaaaaaaaaaaa",
        hash: &[0; 32],
        name: "one more",
        scopes: &["check"],
        organizations: None,
        valid_for: None,
    };
    let manager = manager(url).await;
    let refused = manager.api_key_insert(&one_more()).await.unwrap_err();
    assert!(matches!(refused, KeysError::Full(_)), "{refused}");
    assert!(refused.to_string().contains("10000"), "{refused}");
    let server = start(url).await;
    assert_eq!(with_key(&server, &key).await, "");
    run(
        &client,
        "UPDATE hallpass.api_keys SET revoked_at = now() WHERE name = '7'",
    )
    .await;
    manager.api_key_insert(&one_more()).await.unwrap();
    // One that is not valid any more takes no room from one that is.
    let another = start(url).await;
    assert_eq!(with_key(&another, &key).await, "");
}
