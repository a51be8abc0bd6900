//! Who may change what, and whom the audit log names.

use std::{sync::Arc, time::Duration};

use hallpass::{
    auth::{
        Authenticator,
        api_key::Pepper,
        grants::Grants,
        tokens::{KeySource, Pace, TokenRules, Tokens},
    },
    server::Config,
};
use hallpass_client::{
    tonic::Status,
    v1::{
        AuditFilter, ChangeType, ListAuditEntriesRequest, ListOrganizationPermissionsRequest,
        audit_service_client::AuditServiceClient,
    },
};
use serde_json::json;
use tokio_postgres::Client;

use crate::{
    admin::{Administrator, Change, changes, config_to_change, grant, reason, set, start},
    database::{Database, as_role, connect},
    issuer::{AUDIENCE, ISSUER, KeyServer, Says, SigningKey, key_set, now},
    keyring::{Made, TIMING, config_with_keys, key_id},
    names::id,
    server::{APPROVE, Server, fill, head, resolve},
    sql::{lines, sqlstate, value},
};

/// The change in another organization; one of the catalog stays what it is.
fn moved(mut change: Change, organization: &str) -> Change {
    let there = id(organization).to_string();
    match &mut change {
        Change::Set(request) => request.organization_id = there,
        Change::Bulk(request) => request.organization_id = there,
        Change::Reset(request) => request.organization_id = there,
        Change::PutMember(request) => request.organization_id = there,
        Change::RemoveMember(request) => request.organization_id = there,
        Change::Grant(request) => request.organization_id = there,
        Change::Revoke(request) => request.organization_id = there,
        Change::PutTemplate(_) | Change::DeleteTemplate(_) => {}
    }
    change
}

/// All that a caller is told.
fn told(status: &Status) -> (i32, String, Vec<u8>) {
    assert_eq!(reason(status), "ORGANIZATION_NOT_ALLOWED");
    let details = status.details().to_vec();
    (status.code().into(), status.message().to_owned(), details)
}

/// A service that may change permissions and asks for API keys, and one of these.
async fn start_with_key(made: Made) -> (Database, Client, Server, String) {
    let (database, client, server, [key]) = start_with_keys([made]).await;
    (database, client, server, key)
}

/// The same with several keys.
pub(crate) async fn start_with_keys<const KEYS: usize>(
    made: [Made; KEYS],
) -> (Database, Client, Server, [String; KEYS]) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let mut keys = Vec::new();
    for made in made {
        keys.push(made.make(&database.url).await);
    }
    let authenticator = config_with_keys(&database.url, TIMING, Pepper::default()).authenticator;
    let server = Server::start(Config {
        authenticator,
        ..config_to_change(&database)
    })
    .await;
    (database, client, server, keys.try_into().unwrap())
}

#[tokio::test]
async fn another_organization_is_refused_whether_it_exists_or_not() {
    let (_database, client, server, key) = start_with_key(Made {
        organizations: Some(vec![id("lincoln")]),
        ..Made::default()
    })
    .await;
    let mut administrator = Administrator::with_credential(&server, &key);
    let before = head(&client).await;
    for change in changes() {
        for validate_only in [true, false] {
            let mut refused = Vec::new();
            for organization in ["franklin", "nowhere"] {
                let change = moved(change.clone(), organization);
                let answer = administrator.call(change, validate_only).await;
                refused.push(told(&answer.unwrap_err()));
            }
            assert_eq!(refused[0], refused[1], "{change:?}");
        }
    }
    for organization in ["franklin", "nowhere"] {
        let list = administrator.request(ListOrganizationPermissionsRequest {
            organization_id: id(organization).to_string(),
            ..ListOrganizationPermissionsRequest::default()
        });
        let client = &mut administrator.client;
        told(
            &client
                .list_organization_permissions(list)
                .await
                .unwrap_err(),
        );
    }
    assert_eq!(head(&client).await, before);
    let own = set(APPROVE, "volunteer", true, &[]);
    administrator.make(own).await.unwrap();
    server.stop().await;
}

/// Of the newest entry: who is said to have made it, and from where.
pub(crate) async fn newest(client: &Client) -> String {
    let newest = "
        SELECT coalesce(changed_by::text, 'nobody'), actor_source, host(ip_address), user_agent LIKE 'tonic/%', application_name
        FROM permission_audit_log JOIN hallpass.log USING (entry_id) ORDER BY seq DESC LIMIT 1";
    lines(client, newest).await.concat()
}

#[tokio::test]
async fn a_key_names_itself_and_on_whose_behalf_it_changes() {
    let (_database, client, server, key) = start_with_key(Made::default()).await;
    let key_id = key_id(&key);
    let mut administrator = Administrator::with_credential(&server, &key);

    administrator.make(grant("pat", APPROVE)).await.unwrap();
    let unnamed = format!("nobody | NONE | 127.0.0.1 | t | key:{key_id}");
    assert_eq!(newest(&client).await, unnamed);

    administrator.actor.user_id = id("bob").to_string();
    administrator.actor.ip_address = "192.0.2.9".to_owned();
    administrator.make(grant("vic", APPROVE)).await.unwrap();
    let named = format!("{} | SETTINGS | 192.0.2.9 | t | key:{key_id}", id("bob"));
    assert_eq!(newest(&client).await, named);
    server.stop().await;
}

const GRANTS: &str = r#"
    [[grant]]
    claim = "role"
    value = "administrator"
    scopes = ["admin"]
    organizations = "all"
"#;

/// Whoever signs tokens that a service takes for administrators'.
pub(crate) struct Issuer {
    key: SigningKey,
    _key_server: KeyServer,
}

impl Issuer {
    pub(crate) fn token(&self, subject: &str) -> String {
        let expiry = now() + 600;
        self.key.token(
            &json!({"iss": ISSUER, "aud": AUDIENCE, "exp": expiry, "role": "administrator", "sub": subject}),
        )
    }
}

/// A service that may change permissions and asks for tokens.
pub(crate) async fn start_with_tokens() -> (Database, Client, Server, Issuer) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let key = SigningKey::p256("a");
    let key_server = KeyServer::start(Says::Document(key_set([&key]))).await;
    let rules = TokenRules {
        issuer: ISSUER.to_owned(),
        audience: AUDIENCE.to_owned(),
        leeway: Duration::from_secs(30),
        grants: Grants::parse(GRANTS).unwrap(),
    };
    let source = KeySource::new(&key_server.url, None).unwrap();
    let tokens = Tokens::new(rules, source, Pace::default());
    let server = Server::start(Config {
        authenticator: Arc::new(Authenticator::default().with_tokens(tokens)),
        ..config_to_change(&database)
    })
    .await;
    let issuer = Issuer {
        key,
        _key_server: key_server,
    };
    (database, client, server, issuer)
}

#[tokio::test]
async fn a_token_speaks_for_its_subject_alone() {
    let (_database, client, server, issuer) = start_with_tokens().await;
    let (ann, bob) = (&*id("ann").to_string(), &*id("bob").to_string());
    // As (subject, actor named, actor recorded); empty: refused.
    for (subject, actor, recorded) in [
        (ann, "", ann),
        (ann, bob, ""),
        (ann, ann, ann),
        ("backend", bob, ""),
        ("backend", "", "nobody"),
    ] {
        let token = issuer.token(subject);
        let mut administrator = Administrator::with_credential(&server, &token);
        actor.clone_into(&mut administrator.actor.user_id);
        let before = head(&client).await;
        let role = if actor.is_empty() {
            "volunteer"
        } else {
            "admin"
        };
        let made = administrator.make(set(APPROVE, role, true, &[])).await;
        if recorded.is_empty() {
            assert_eq!(reason(&made.unwrap_err()), "INVALID_REQUEST");
            assert_eq!(head(&client).await, before);
            continue;
        }
        made.unwrap();
        let found = newest(&client).await;
        assert!(found.starts_with(recorded), "{found}");
        administrator.actor.profile_id = bob.to_owned();
        let forged = administrator.make(set(APPROVE, role, true, &[])).await;
        assert_eq!(reason(&forged.unwrap_err()), "INVALID_REQUEST");
        assert!(found.ends_with(&format!("jwt:{subject}")), "{found}");
    }
    server.stop().await;
}

#[tokio::test]
async fn an_actor_ends_with_its_transaction() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let login = connect(&as_role(&database.url, "hallpass_admin")).await;
    let step = json!([{"change": "grant_user", "org_id": id("lincoln"), "user_id": id("pat"), "permission_key": APPROVE}]);
    let actor = json!({
        "user_id": id("ann"), "profile_id": id("ann"), "ip_address": "192.0.2.7", "user_agent": "Firefox",
        "session_id": "3", "request_id": "7", "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "caller": "key:a",
    });
    let change = format!("SELECT hallpass.change('{step}', '{actor}', 'BULK_UPDATE')");
    login.batch_execute(&change).await.unwrap();
    let left = "
        SELECT concat(current_setting('application_name'), string_agg(current_setting('app.current_' || name, true), ''))
        FROM unnest('{user_id,profile_id,org_id,request_id,ip,user_agent,session_id,trace_id,change_kind}'::text[]) name";
    assert_eq!(value(&login, left).await, "");
}

#[tokio::test]
async fn the_login_that_changes_may_do_nothing_else() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let login = connect(&as_role(&database.url, "hallpass_admin")).await;
    for statement in [
        "SELECT FROM organization_permissions",
        "SELECT FROM hallpass.log",
        "SELECT FROM hallpass.api_keys",
        "DELETE FROM profiles",
        "DELETE FROM permission_audit_log",
        "SELECT hallpass.take_step('{}')",
        "SELECT hallpass.put_member(:lincoln, :eve, 'admin')",
    ] {
        let refused = login.batch_execute(&resolve(statement)).await;
        assert_eq!(sqlstate(&refused.unwrap_err()), "42501", "{statement}");
    }
}

#[tokio::test]
async fn the_audit_api_tells_resets_and_bulk_updates() {
    let (_database, _client, server, mut administrator) = start().await;
    for change in changes() {
        administrator.make(change).await.unwrap();
    }
    let mut audit = AuditServiceClient::new(server.channel.clone());
    for (change_type, count) in [(ChangeType::Reset, 1), (ChangeType::BulkUpdate, 2)] {
        let request = ListAuditEntriesRequest {
            filter: Some(AuditFilter {
                change_type: change_type.into(),
                ..AuditFilter::default()
            }),
            ..ListAuditEntriesRequest::default()
        };
        let entries = audit.list_audit_entries(request).await.unwrap();
        let entries = entries.into_inner().entries;
        assert_eq!(entries.len(), count, "{change_type:?}");
        for entry in entries {
            assert_eq!(entry.change_type(), change_type);
            assert_eq!(entry.actor_user_id, id("ann").to_string());
        }
    }
    server.stop().await;
}
