//! A stream of audit entries goes on for as long as its credential would open another, and ends as that would be answered:
//! with its cursor, and alone.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use hallpass::{
    auth::{
        Authenticator,
        api_key::Pepper,
        certificates::Certificates,
        grants::Grants,
        tokens::{KeySource, Pace, TokenRules, Tokens},
    },
    server::Config,
};
use hallpass_client::{
    ClientTls,
    tonic::Code,
    v1::{AuditFilter, stream_audit_entries_request::Start},
};
use serde_json::json;
use tokio_postgres::Client;

use crate::{
    consumer::{Consumer, changed, cursor, entries_where},
    issuer::{AUDIENCE, ISSUER, SigningKey, key_set, now},
    keyring::{Made, TIMING, config_with_keys, key_id},
    pki::{Authority, Files, Validity},
    server::{Server, config, head, set_role},
    sql::run,
};

/// From an answer that is not within the bound any more to the end of the stream, on a machine that is busy.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// What becomes of a key, and how its stream ends.
const CASES: [(&str, Code, &str); 6] = [
    (
        "UPDATE hallpass.api_keys SET revoked_at = now()",
        Code::Unauthenticated,
        "CREDENTIAL_REVOKED",
    ),
    (
        "UPDATE hallpass.api_keys SET expires_at = now() + interval '1 ms'",
        Code::Unauthenticated,
        "CREDENTIAL_EXPIRED",
    ),
    (
        "DELETE FROM hallpass.api_keys",
        Code::Unauthenticated,
        "CREDENTIAL_INVALID",
    ),
    // Another secret under the same id.
    (
        "UPDATE hallpass.api_keys SET hash = decode(repeat('00', 32), 'hex')",
        Code::Unauthenticated,
        "CREDENTIAL_INVALID",
    ),
    (
        "UPDATE hallpass.api_keys SET scopes = '{check,list}'",
        Code::PermissionDenied,
        "SCOPE_MISSING",
    ),
    // It may still stream, and something else.
    (
        "UPDATE hallpass.api_keys SET organization_ids = (SELECT array_agg(id) FROM organizations)",
        Code::Unavailable,
        "STREAM_ENDED",
    ),
];

fn all() -> AuditFilter {
    AuditFilter::default()
}

/// Everything up to `at` and what is behind it are the log.
async fn assert_goes_on(
    server: &Server,
    client: &Client,
    credential: &str,
    ended: &Consumer,
    at: &str,
) {
    let mut rest = Consumer::start_as(&server.channel, credential, cursor(at), all())
        .await
        .unwrap();
    rest.until(head(client).await).await;
    let taken: Vec<String> = ended.lines().into_iter().chain(rest.lines()).collect();
    assert_eq!(taken, entries_where(client, "true").await);
}

#[tokio::test]
async fn a_stream_ends_with_its_key_and_others_go_on() {
    let (database, client) = changed().await;
    let url = &database.url;
    let staying = Made::default().make(url).await;
    let mut keys = Vec::new();
    for _ in CASES {
        keys.push(Made::default().make(url).await);
    }
    let server = Server::start(config_with_keys(url, TIMING, Pepper::default())).await;
    let start = async |key: &str| {
        let start = Start::Earliest(true);
        let mut stream = Consumer::start_as(&server.channel, key, start, all())
            .await
            .unwrap();
        stream.until(head(&client).await).await;
        stream
    };
    let mut other = start(&staying).await;
    let mut streams = Vec::new();
    for key in &keys {
        streams.push(start(key).await);
    }
    let change = |((change, ..), key): (&(&str, _, _), &String)| {
        format!("{change} WHERE id = '{}';", key_id(key))
    };
    let changes: String = CASES.iter().zip(&keys).map(change).collect();
    run(&client, &changes).await;
    let since = Instant::now();
    set_role(&client, "lincoln", "ann", "board_member").await;
    let mut ends = Vec::new();
    for (mut stream, (change, code, reason)) in streams.into_iter().zip(CASES) {
        let (found, why, at) = stream.until_it_ends().await;
        assert_eq!((found, &*why), (code, reason), "{change}");
        ends.push((stream, at));
    }
    let took = since.elapsed();
    assert!(took <= TIMING.staleness_bound + LOOK_MAX, "{took:?}");
    set_role(&client, "lincoln", "ann", "committee_lead").await;
    for (stream, at) in &ends {
        assert_goes_on(&server, &client, &staying, stream, at).await;
    }
    other.until(head(&client).await).await;
    assert_eq!(other.lines(), entries_where(&client, "true").await);
}

/// Its time is over, or its issuer takes back the key that signed it.
#[tokio::test]
async fn a_stream_ends_with_its_token_and_others_go_on() {
    const GRANTS: &str = "
        [[grant]]
        claim = \"role\"
        value = \"auditor\"
        scopes = [\"audit\"]
        organizations = \"all\"";
    let (kept, stolen) = (SigningKey::ed25519("kept"), SigningKey::ed25519("stolen"));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("jwks.json");
    let put = |document: &str| {
        let next = path.with_extension("next");
        fs::write(&next, document).unwrap();
        fs::rename(next, &path).unwrap();
    };
    put(&key_set([&kept, &stolen]));
    let rules = TokenRules {
        issuer: ISSUER.to_owned(),
        audience: AUDIENCE.to_owned(),
        leeway: Duration::ZERO,
        grants: Grants::parse(GRANTS).unwrap(),
    };
    let pace = Pace {
        file_interval: Duration::from_millis(20),
        ..Pace::default()
    };
    let source = KeySource::new(path.to_str().unwrap(), None).unwrap();
    let tokens = Tokens::new(rules, source, pace);
    let (database, client) = changed().await;
    let server = Server::start(Config {
        authenticator: Authenticator::default().with_tokens(tokens).into(),
        ..config(&database.url)
    })
    .await;
    let token = |key: &SigningKey, expires: i64| {
        key.token(&json!({"iss": ISSUER, "aud": AUDIENCE, "sub": "siem", "role": "auditor", "exp": expires}))
    };
    let start = async |token: &str| {
        let start = Start::Earliest(true);
        Consumer::start_as(&server.channel, token, start, all())
            .await
            .unwrap()
    };
    let expires = now() + 2;
    let staying = token(&kept, now() + 600);
    let mut other = start(&staying).await;
    let mut by_stolen = start(&token(&stolen, now() + 600)).await;
    let mut brief = start(&token(&kept, expires)).await;
    put(&key_set([&kept, &SigningKey::ed25519("stolen")]));

    let (code, why, at) = by_stolen.until_it_ends().await;
    assert_eq!((code, &*why), (Code::Unauthenticated, "CREDENTIAL_INVALID"));
    assert_goes_on(&server, &client, &staying, &by_stolen, &at).await;
    let (code, why, at) = brief.until_it_ends().await;
    assert_eq!((code, &*why), (Code::Unauthenticated, "CREDENTIAL_EXPIRED"));
    assert!((expires..=expires + 2).contains(&now()), "{expires}");
    set_role(&client, "lincoln", "ann", "board_member").await;
    assert_goes_on(&server, &client, &staying, &brief, &at).await;
    other.until(head(&client).await).await;
    assert_eq!(other.lines(), entries_where(&client, "true").await);
}

/// Its certificate is the connection's, and it is looked at again as any credential is.
#[tokio::test]
async fn a_stream_by_a_certificate_goes_on() {
    let authority = Authority::new();
    let issued = authority.server(&["127.0.0.1"], Validity::Now);
    let files = Files::new(&issued, Some(&authority.pem));
    let grants = "
        [[grant]]
        certificate = \"siem.district.example\"
        scopes = [\"audit\"]
        organizations = \"all\"";
    let certificates = Certificates::new(&Grants::parse(grants).unwrap());
    let (database, client) = changed().await;
    let config = Config {
        authenticator: Arc::new(Authenticator::default().with_certificates(certificates)),
        tls: Some(Arc::new(files.load())),
        ..config(&database.url)
    };
    let siem = authority.client(&[], &["siem.district.example"], Validity::Now);
    let tls = ClientTls {
        identity: Some(siem.identity()),
        ..authority.believed()
    };
    let mut server = Server::listening_tls(config, tls).await;
    server.ready().await;
    let start = Start::Earliest(true);
    let mut stream = Consumer::start(&server.channel, start, all())
        .await
        .unwrap();
    // Each comes half a second after the one before, and so do the looks.
    while stream.checkpoints < 4 {
        stream.next().await.unwrap();
    }
    assert_eq!(stream.lines(), entries_where(&client, "true").await);
}
