//! Tokens through the wire: which are good, what they are good for, and how keys come and go.

use std::time::Duration;

use futures_util::future::join_all;
use hallpass::{
    auth::{
        Authenticator,
        grants::Grants,
        tokens::{KeySource, Pace, TokenRules, Tokens},
    },
    limits::Bounds,
    server::Config,
};
use hallpass_client::{
    tonic::{Request, Status},
    v1::{
        BatchCheckPermissionsItem, BatchCheckPermissionsRequest, GetOrganizationSummaryRequest,
        ListPermissionHoldersRequest, ListUserOrganizationsRequest, ListUserPermissionsRequest,
        batch_check_permissions_result::Result as ItemResult,
    },
};
use rcgen::generate_simple_self_signed;
use serde_json::{Value, json};
use tonic_types::StatusExt;

use crate::{
    database::{Database, eventually},
    issuer::{
        AUDIENCE, ISSUER, KeyServer, Says, SigningKey, base64, key_set, message, now,
        sign_with_secret,
    },
    names::id,
    server::{APPROVE, Server, bounds, config, fill, question},
};

/// The grants of every test here.
const GRANTS: &str = r#"
    [[grant]]
    claim = "role"
    value = "service_role"
    scopes = ["check", "list"]
    organizations = "all"

    [[grant]]
    claim = "role"
    value = "authenticated"
    scopes = ["check", "list"]
    organizations = "all"
    only_own_user = true

    [[grant]]
    claim = "role"
    value = "tenant"
    scopes = ["check", "list"]
    organizations = { claim = "app_metadata.org_id" }
"#;

const ALLOWED: &str = "allow GRANTED_BY_ROLE";
const INVALID: &str = "CREDENTIAL_INVALID";
const EXPIRED: &str = "CREDENTIAL_EXPIRED";
const UNAVAILABLE: &str = "CREDENTIALS_UNAVAILABLE";

const LEEWAY: Duration = Duration::from_secs(30);

/// As it is by default, but for the waits that a test should not have.
fn pace() -> Pace {
    Pace {
        file_interval: Duration::from_millis(20),
        read_max: Duration::from_millis(300),
        wait_max: Duration::from_secs(1),
        ..Pace::default()
    }
}

/// A service that takes tokens alone, on a database of two organizations.
async fn start(keys: &str, leeway: Duration, pace: Pace) -> (Database, Server) {
    start_from(KeySource::new(keys, None).unwrap(), leeway, pace).await
}

async fn start_from(source: KeySource, leeway: Duration, pace: Pace) -> (Database, Server) {
    start_within(bounds(), source, leeway, pace).await
}

async fn start_within(
    bounds: Bounds,
    source: KeySource,
    leeway: Duration,
    pace: Pace,
) -> (Database, Server) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let rules = TokenRules {
        issuer: ISSUER.to_owned(),
        audience: AUDIENCE.to_owned(),
        leeway,
        grants: Grants::parse(GRANTS).unwrap(),
    };
    let tokens = Tokens::new(rules, source, pace);
    let server = Server::start(Config {
        authenticator: Authenticator::default().with_tokens(tokens).into(),
        bounds,
        ..config(&database.url)
    })
    .await;
    (database, server)
}

/// A service that has read the keys of `server`.
async fn start_with(key_server: &KeyServer, pace: Pace) -> (Database, Server) {
    start(&key_server.url, LEEWAY, pace).await
}

/// The claims of a backend's token, with changes: `null` takes a claim away.
fn claims(changes: &Value) -> Value {
    let mut claims = json!({
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "backend",
        "role": "service_role",
        "exp": now() + 600,
    });
    for (name, value) in changes.as_object().unwrap() {
        let claims = claims.as_object_mut().unwrap();
        match value {
            Value::Null => drop(claims.remove(name)),
            value => drop(claims.insert(name.clone(), value.clone())),
        }
    }
    claims
}

fn bearing<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let credential = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", credential);
    request
}

/// Why a call was refused, as programs read it.
fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info();
    info.map_or_else(|| format!("{status:?}"), |info| info.reason.clone())
}

/// Whether ann may approve, asked with a token.
async fn ask(server: &Server, token: &str) -> String {
    ask_about(server, token, "lincoln", "ann").await
}

async fn ask_about(server: &Server, token: &str, organization: &str, user: &str) -> String {
    let question = bearing(token, question(organization, user, APPROVE));
    match server.try_check(question).await {
        Ok(answer) => answer.said,
        Err(status) => reason(&status),
    }
}

#[tokio::test]
async fn a_token_is_good_when_all_of_it_is() {
    let (ed, ec, rsa) = (
        SigningKey::ed25519("ed"),
        SigningKey::p256("ec"),
        SigningKey::rsa("rsa"),
    );
    let mut keys: Value = serde_json::from_str(&key_set([&ed, &ec, &rsa])).unwrap();
    let encrypting = SigningKey::p256("encrypting");
    let mut public = encrypting.public();
    public["use"] = "enc".into();
    let pss = SigningKey::rsa("pss");
    let mut public_pss = pss.public();
    public_pss["alg"] = "PS256".into();
    let unusable = [
        public,
        public_pss,
        json!({"kty": "RSA", "kid": "weak", "n": WEAK_MODULUS, "e": "AQAB"}),
        json!({"kty": "oct", "kid": "secret", "k": base64("secret"), "alg": "HS256"}),
        json!({"kty": "AKP", "kid": "post-quantum", "alg": "ML-DSA-44", "pub": "AA"}),
        json!("no key at all"),
    ];
    keys["keys"].as_array_mut().unwrap().extend(unusable);
    let key_server = KeyServer::start(Says::Document(keys.to_string())).await;
    let (_database, server) = start_with(&key_server, pace()).await;

    let good = claims(&json!({})).to_string();
    let claim = |changes: Value| ed.token(&claims(&changes));
    let header = |header: Value| ed.sign(&header.to_string(), &good);
    let ed_header = json!({"alg": "EdDSA", "kid": "ed"}).to_string();
    let payload = |payload: &str| ed.sign(&ed_header, payload);
    let twice = |name: &str| payload(&good.replacen('{', &format!(r#"{{"{name}":"x","#), 1));
    let token = claim(json!({}));
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let (first, second) = signed.split_once('.').unwrap();
    let admin = base64(claims(&json!({"sub": "admin"})).to_string());
    let long = "x".repeat(8 << 10);
    let nested = format!(r#"{{"x":{}{}}}"#, "[".repeat(4_000), "]".repeat(4_000));
    let ec_public = serde_json::to_vec(&ec.public()).unwrap();
    let secret_header = |kid: &str| json!({"alg": "HS256", "kid": kid}).to_string();
    let cases = [
        ("EdDSA", token.clone(), ALLOWED),
        ("ES256", ec.token(&claims(&json!({}))), ALLOWED),
        ("RS256", rsa.token(&claims(&json!({}))), ALLOWED),
        (
            "list of audiences",
            claim(json!({"aud": ["other", AUDIENCE]})),
            ALLOWED,
        ),
        (
            "expired within the leeway",
            claim(json!({"exp": now() - 15})),
            ALLOWED,
        ),
        (
            "valid soon, within the leeway",
            claim(json!({"nbf": now() + 15})),
            ALLOWED,
        ),
        (
            "exp with a fraction",
            claim(json!({"exp": 4_102_444_800.5_f64})),
            ALLOWED,
        ),
        (
            "no type",
            header(json!({"alg": "EdDSA", "kid": "ed"})),
            ALLOWED,
        ),
        (
            "access token",
            header(json!({"alg": "EdDSA", "kid": "ed", "typ": "at+jwt"})),
            ALLOWED,
        ),
        ("expired", claim(json!({"exp": now() - 45})), EXPIRED),
        ("expired in 1970", claim(json!({"exp": 0})), EXPIRED),
        ("not yet valid", claim(json!({"nbf": now() + 45})), INVALID),
        ("nbf is no number", claim(json!({"nbf": "soon"})), INVALID),
        (
            "other issuer",
            claim(json!({"iss": "https://evil.example"})),
            INVALID,
        ),
        (
            "issuer with a slash",
            claim(json!({"iss": format!("{ISSUER}/")})),
            INVALID,
        ),
        ("no issuer", claim(json!({"iss": null})), INVALID),
        ("other audience", claim(json!({"aud": "other"})), INVALID),
        (
            "list without the audience",
            claim(json!({"aud": ["other", "another"]})),
            INVALID,
        ),
        (
            "empty list of audiences",
            claim(json!({"aud": []})),
            INVALID,
        ),
        ("no audience", claim(json!({"aud": null})), INVALID),
        (
            "audience is no string",
            claim(json!({"aud": {"authenticated": 1}})),
            INVALID,
        ),
        ("no exp", claim(json!({"exp": null})), INVALID),
        (
            "exp is no number",
            claim(json!({"exp": "4102444800"})),
            INVALID,
        ),
        ("exp is negative", claim(json!({"exp": -1})), INVALID),
        ("no subject", claim(json!({"sub": null})), INVALID),
        ("empty subject", claim(json!({"sub": ""})), INVALID),
        ("subject is a number", claim(json!({"sub": 7})), INVALID),
        (
            "long subject",
            claim(json!({"sub": "x".repeat(256)})),
            INVALID,
        ),
        ("issuer twice", twice("iss"), INVALID),
        ("role twice", twice("role"), INVALID),
        (
            "nested twice",
            payload(&good.replacen('{', r#"{"a":{"b":1,"b":2},"#, 1)),
            INVALID,
        ),
        ("no signature", format!("{signed}."), INVALID),
        ("two parts", signed.to_owned(), INVALID),
        ("four parts", format!("{token}.x"), INVALID),
        (
            "other payload",
            format!("{first}.{admin}.{signature}"),
            INVALID,
        ),
        (
            "other header",
            format!(
                "{}.{second}.{signature}",
                base64(r#"{"alg":"ES256","kid":"ed"}"#)
            ),
            INVALID,
        ),
        ("other key's signature", ec.sign(&ed_header, &good), INVALID),
        (
            "none",
            format!("{}.", message(r#"{"alg":"none","kid":"ed"}"#, &good)),
            INVALID,
        ),
        (
            "none, signed",
            ed.sign(r#"{"alg":"none","kid":"ed"}"#, &good),
            INVALID,
        ),
        (
            "the public key as a secret",
            sign_with_secret(&secret_header("ec"), &good, &ec_public),
            INVALID,
        ),
        (
            "the set's secret",
            sign_with_secret(&secret_header("secret"), &good, b"secret"),
            INVALID,
        ),
        (
            "RS256 with the key of ES256",
            rsa.sign(r#"{"alg":"RS256","kid":"ec"}"#, &good),
            INVALID,
        ),
        (
            "ES256 under RS256's name",
            ec.sign(r#"{"alg":"RS256","kid":"ec"}"#, &good),
            INVALID,
        ),
        (
            "RS512 with the key of RS256",
            rsa.sign_rs512(r#"{"alg":"RS512","kid":"rsa"}"#, &good),
            INVALID,
        ),
        (
            "PS256 key",
            pss.sign(r#"{"alg":"RS256","kid":"pss"}"#, &good),
            INVALID,
        ),
        (
            "key for encryption",
            encrypting.token(&claims(&json!({}))),
            INVALID,
        ),
        ("key of 1024 bits", WEAK_TOKEN.to_owned(), INVALID),
        (
            "own key in the header",
            header(json!({"alg": "EdDSA", "kid": "x", "jwk": ed.public()})),
            INVALID,
        ),
        ("no key id", header(json!({"alg": "EdDSA"})), INVALID),
        (
            "key id is no string",
            header(json!({"alg": "EdDSA", "kid": 1})),
            INVALID,
        ),
        (
            "unknown extension",
            header(json!({"alg": "EdDSA", "kid": "ed", "crit": ["b64"], "b64": false})),
            INVALID,
        ),
        (
            "other kind",
            header(json!({"alg": "EdDSA", "kid": "ed", "typ": "logout+jwt"})),
            INVALID,
        ),
        ("claims are a list", payload("[]"), INVALID),
        ("claims are deep", payload(&nested), INVALID),
        ("claims are no JSON", payload("{"), INVALID),
        ("too long", claim(json!({"x": long})), INVALID),
        ("an API key", "hp_abc_def".to_owned(), INVALID),
        ("garbage", "!".to_owned(), INVALID),
        ("dots", "..".to_owned(), INVALID),
    ];
    for (what, token, expected) in &cases {
        // What was found out may be remembered: it must not change.
        for time in ["first", "second"] {
            assert_eq!(
                ask(&server, token).await,
                *expected,
                "{what}, the {time} time"
            );
        }
    }
    let unasked = server.try_check(question("lincoln", "ann", APPROVE)).await;
    assert_eq!(reason(&unasked.unwrap_err()), "CREDENTIAL_MISSING");
}

/// A signature is work: an address that sends forged ones gets no more looked at, and those that are good cost nothing.
#[tokio::test]
async fn tokens_are_verified_within_the_limit_of_their_address() {
    const LIMITED: &str = "RATE_LIMITED";
    let key = SigningKey::rsa("a");
    let key_server = KeyServer::start(Says::Document(key_set([&key]))).await;
    let bounds = Bounds {
        credential_rate_max: 1,
        ..bounds()
    };
    let source = KeySource::new(&key_server.url, None).unwrap();
    let (_database, server) = start_within(bounds, source, LEEWAY, pace()).await;
    let token = |id: &str| key.token(&claims(&json!({"jti": id})));
    // The first may have to wait for the keys, which is counted.
    let remembered = token("remembered");
    eventually("the keys are there", async || {
        ask(&server, &remembered).await == ALLOWED
    })
    .await;
    let good = token("next");
    eventually("what the keys cost is forgotten", async || {
        ask(&server, &good).await == ALLOWED
    })
    .await;
    for n in 0..20 {
        assert_eq!(ask(&server, &token(&n.to_string())).await, ALLOWED);
    }
    let forged = SigningKey::rsa("a").token(&claims(&json!({})));
    let mut round = 0;
    eventually("nothing is looked at", async || {
        round += 1;
        let good = token(&format!("late {round}"));
        let said = ask(&server, &forged).await;
        assert!([INVALID, LIMITED].contains(&&*said), "{said}");
        assert_eq!(ask(&server, &remembered).await, ALLOWED);
        ask(&server, &good).await == LIMITED
    })
    .await;
    let good = token("last");
    eventually("it is over", async || ask(&server, &good).await == ALLOWED).await;
}

#[tokio::test]
async fn a_remembered_token_expires() {
    let key = SigningKey::ed25519("a");
    let key_server = KeyServer::start(Says::Document(key_set([&key]))).await;
    let (_database, server) = start(&key_server.url, Duration::ZERO, pace()).await;
    let token = key.token(&claims(&json!({"exp": now() + 3})));
    assert_eq!(ask(&server, &token).await, ALLOWED);
    eventually("it has expired", async || {
        let said = ask(&server, &token).await;
        assert!([ALLOWED, EXPIRED].contains(&&*said), "{said}");
        said == EXPIRED
    })
    .await;
}

#[tokio::test]
async fn keys_are_rotated_without_a_good_token_refused() {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::p256("new"));
    let key_server = KeyServer::start(Says::Document(key_set([&old]))).await;
    let (_database, server) = start_with(&key_server, pace()).await;
    let good = claims(&json!({}));
    assert_eq!(ask(&server, &old.token(&good)).await, ALLOWED);
    assert_eq!(key_server.asked(), 1);

    key_server.set(Says::Document(key_set([&old, &new])));
    let tokens: Vec<String> = (0..50)
        .map(|n| new.token(&claims(&json!({"jti": n}))))
        .collect();
    let said = join_all(tokens.iter().map(|token| ask(&server, token))).await;
    assert!(said.iter().all(|said| said == ALLOWED), "{said:?}");
    assert_eq!(key_server.asked(), 2, "they were read once for all of them");
    assert_eq!(ask(&server, &old.token(&good)).await, ALLOWED);

    // Whoever makes ids up gets no third reading, nor any wait.
    let made_up = SigningKey::ed25519("made up").token(&good);
    assert_eq!(ask(&server, &made_up).await, INVALID);
    assert_eq!(key_server.asked(), 2);
}

#[tokio::test]
async fn a_key_that_is_taken_back_takes_its_tokens_along() {
    let (kept, stolen) = (SigningKey::ed25519("kept"), SigningKey::ed25519("stolen"));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("jwks.json");
    let put = |document: &str| {
        let next = path.with_extension("next");
        std::fs::write(&next, document).unwrap();
        std::fs::rename(next, &path).unwrap();
    };
    put(&key_set([&kept, &stolen]));
    let (_database, server) = start(path.to_str().unwrap(), LEEWAY, pace()).await;
    let good = claims(&json!({}));
    let (by_kept, by_stolen) = (kept.token(&good), stolen.token(&good));
    assert_eq!(ask(&server, &by_kept).await, ALLOWED);
    assert_eq!(ask(&server, &by_stolen).await, ALLOWED);
    // Under the same id another key, as those do it who do not know better.
    put(&key_set([&kept, &SigningKey::ed25519("stolen")]));
    eventually("the stolen key is of no use", async || {
        assert_eq!(ask(&server, &by_kept).await, ALLOWED);
        ask(&server, &by_stolen).await == INVALID
    })
    .await;
    // No document at all changes nothing.
    put("{");
    let stray = SigningKey::ed25519("stray").token(&good);
    eventually("the file is seen to be broken", async || {
        assert_eq!(ask(&server, &by_kept).await, ALLOWED);
        ask(&server, &stray).await == UNAVAILABLE
    })
    .await;
    assert_eq!(ask(&server, &by_stolen).await, INVALID);
}

/// Ways for a server of keys to fail.
fn failures(elsewhere: &KeyServer) -> Vec<Says> {
    vec![
        Says::Nothing,
        Says::Half,
        Says::Endless,
        Says::Status("500 Internal Server Error"),
        Says::Redirect(elsewhere.url.clone()),
        Says::Document("{}".to_owned()),
        Says::Document("<html>".to_owned()),
        Says::Document(json!({ "keys": vec![json!({}); 101] }).to_string()),
    ]
}

#[tokio::test]
async fn keys_are_believed_while_they_cannot_be_read_again_but_not_for_ever() {
    let (key, other) = (SigningKey::ed25519("a"), SigningKey::ed25519("b"));
    let elsewhere = KeyServer::start(Says::Document(key_set([&key, &other]))).await;
    let key_server = KeyServer::start(Says::Status("503 Service Unavailable")).await;
    let interval = Duration::from_millis(50);
    let fast = Pace {
        url_interval: interval,
        hasten_interval: interval,
        ..pace()
    };
    let (_database, server) = start_with(&key_server, fast).await;
    let good = claims(&json!({}));
    let (token, unknown) = (key.token(&good), other.token(&good));
    assert_eq!(
        ask(&server, &token).await,
        UNAVAILABLE,
        "no key was ever read"
    );
    let document = Says::Document(key_set([&key]));
    for failure in failures(&elsewhere) {
        key_server.set(document.clone());
        eventually("keys are read", async || {
            ask(&server, &unknown).await == INVALID
        })
        .await;
        assert_eq!(ask(&server, &token).await, ALLOWED);
        key_server.set(failure.clone());
        eventually(&format!("{failure:?} is seen"), async || {
            assert_eq!(ask(&server, &token).await, ALLOWED, "{failure:?}");
            ask(&server, &unknown).await == UNAVAILABLE
        })
        .await;
    }
    server.stop().await;

    key_server.set(document);
    let age_max = Duration::from_secs(1);
    let (_database, server) = start_with(&key_server, Pace { age_max, ..fast }).await;
    assert_eq!(ask(&server, &token).await, ALLOWED);
    key_server.set(Says::Status("503 Service Unavailable"));
    eventually("they are too old", async || {
        ask(&server, &token).await == UNAVAILABLE
    })
    .await;
    key_server.set(Says::Document(key_set([&key])));
    eventually("they are read again", async || {
        ask(&server, &token).await == ALLOWED
    })
    .await;
}

#[tokio::test]
async fn keys_over_https_come_from_the_issuers_own_server() {
    let certify = |name: &str| generate_simple_self_signed([name.to_owned()]).unwrap();
    let (own, others, misnamed) = (
        certify("127.0.0.1"),
        certify("127.0.0.1"),
        certify("issuer.example"),
    );
    let directory = tempfile::tempdir().unwrap();
    let key = SigningKey::ed25519("a");
    let token = key.token(&claims(&json!({})));
    let cases = [
        ("its own authority", &own, &own, ALLOWED),
        (
            "another authority of the same name",
            &own,
            &others,
            UNAVAILABLE,
        ),
        ("another server's name", &misnamed, &misnamed, UNAVAILABLE),
    ];
    for (what, certificate, trusted, expected) in cases {
        let document = Says::Document(key_set([&key]));
        let key_server = KeyServer::start_tls(document, certificate).await;
        let ca_file = directory.path().join("ca.pem");
        std::fs::write(&ca_file, trusted.cert.pem()).unwrap();
        let source = KeySource::new(&key_server.url, Some(&ca_file)).unwrap();
        let (_database, server) = start_from(source, LEEWAY, pace()).await;
        assert_eq!(ask(&server, &token).await, expected, "{what}");
    }
}

/// Every question there is about a user and an organization, and what is said to it.
async fn ask_all(server: &Server, token: &str, organization: &str, user: &str) -> [String; 6] {
    let organization_id = id(organization).to_string();
    let user_id = id(user).to_string();
    let mut client = server.client();
    let item = BatchCheckPermissionsItem {
        organization_id: organization_id.clone(),
        user_id: user_id.clone(),
        permission: APPROVE.to_owned(),
    };
    let batch = BatchCheckPermissionsRequest {
        items: vec![item],
        ..BatchCheckPermissionsRequest::default()
    };
    let batch = client.batch_check_permissions(bearing(token, batch)).await;
    let batch = batch.map_err(|status| reason(&status)).map(|response| {
        match response.into_inner().results.remove(0).result.unwrap() {
            ItemResult::Answer(_) => "answered".to_owned(),
            ItemResult::Error(error) => format!("{:?}", error.code),
        }
    });
    let permissions = ListUserPermissionsRequest {
        organization_id: organization_id.clone(),
        user_id: user_id.clone(),
        ..ListUserPermissionsRequest::default()
    };
    let permissions = client
        .list_user_permissions(bearing(token, permissions))
        .await;
    let organizations = ListUserOrganizationsRequest {
        user_id,
        ..ListUserOrganizationsRequest::default()
    };
    let organizations = client
        .list_user_organizations(bearing(token, organizations))
        .await;
    let holders = ListPermissionHoldersRequest {
        organization_id: organization_id.clone(),
        permission: APPROVE.to_owned(),
        ..ListPermissionHoldersRequest::default()
    };
    let holders = client
        .list_permission_holders(bearing(token, holders))
        .await;
    let summary = GetOrganizationSummaryRequest {
        organization_id,
        ..GetOrganizationSummaryRequest::default()
    };
    let summary = client
        .get_organization_summary(bearing(token, summary))
        .await;
    let said = |outcome: Result<String, Status>| outcome.unwrap_or_else(|status| reason(&status));
    let answered = |_| "answered".to_owned();
    let listed = organizations.map(|response| {
        let listed = response.into_inner().organizations.len();
        format!("{listed} organizations")
    });
    [
        ask_about(server, token, organization, user).await,
        batch.unwrap_or_else(|reason| reason),
        said(permissions.map(|_| "answered".to_owned())),
        said(listed),
        said(holders.map(|_| "answered".to_owned())),
        said(summary.map(|response| answered(response.into_inner()))),
    ]
}

const DENIED_ITEM: &str = "7";

#[tokio::test]
async fn a_users_own_token_asks_about_that_user_alone() {
    let key = SigningKey::p256("a");
    let key_server = KeyServer::start(Says::Document(key_set([&key]))).await;
    let (_database, server) = start_with(&key_server, pace()).await;
    let own = |sub: Value| key.token(&claims(&json!({"role": "authenticated", "sub": sub})));
    let ann = own(id("ann").to_string().into());
    let not_hers = "USER_NOT_ALLOWED";
    assert_eq!(
        ask_all(&server, &ann, "lincoln", "ann").await,
        [
            ALLOWED,
            "answered",
            "answered",
            "2 organizations",
            not_hers,
            not_hers
        ]
    );
    for user in ["bob", "nobody"] {
        assert_eq!(
            ask_all(&server, &ann, "lincoln", user).await,
            [
                not_hers,
                DENIED_ITEM,
                not_hers,
                not_hers,
                not_hers,
                not_hers
            ],
            "{user}"
        );
    }
    // Whose own it is must be beyond doubt.
    for subject in [
        json!("ann"),
        json!(id("ann").simple().to_string()),
        json!(format!("{{{}}}", id("ann"))),
    ] {
        assert_eq!(
            ask(&server, &own(subject.clone())).await,
            INVALID,
            "{subject}"
        );
    }
    let both = json!({"role": ["authenticated", "service_role"], "sub": id("ann").to_string()});
    let both = key.token(&claims(&both));
    assert_eq!(ask(&server, &both).await, INVALID, "own user, or any?");
    let nothing = key.token(&claims(&json!({"role": "anon"})));
    assert_eq!(
        ask_all(&server, &nothing, "lincoln", "ann").await,
        ["SCOPE_MISSING"; 6]
    );
}

#[tokio::test]
async fn a_token_reaches_the_organizations_that_it_lists() {
    let key = SigningKey::rsa("a");
    let key_server = KeyServer::start(Says::Document(key_set([&key]))).await;
    let (_database, server) = start_with(&key_server, pace()).await;
    let (lincoln, franklin) = (id("lincoln").to_string(), id("franklin").to_string());
    let outside = "ORGANIZATION_NOT_ALLOWED";
    let cases = [
        (json!({"org_id": lincoln}), [ALLOWED, outside]),
        (json!({"org_id": [lincoln]}), [ALLOWED, outside]),
        (json!({"org_id": [lincoln, franklin]}), [ALLOWED, ALLOWED]),
        (
            json!({"org_id": lincoln.to_uppercase()}),
            [ALLOWED, outside],
        ),
        (json!({"org_id": []}), [outside, outside]),
        (json!({"org_id": [lincoln, 7]}), [outside, outside]),
        (json!({"org_id": [lincoln, "franklin"]}), [outside, outside]),
        (
            json!({"org_id": format!("{lincoln} {franklin}")}),
            [outside, outside],
        ),
        (json!({"org_id": "all"}), [outside, outside]),
        (json!({"org_id": "*"}), [outside, outside]),
        (json!({"org_id": null}), [outside, outside]),
        (json!({"org_id": true}), [outside, outside]),
        (json!({"org_id": {"id": lincoln}}), [outside, outside]),
        (json!({"org_ids": lincoln}), [outside, outside]),
        (json!([{"org_id": lincoln}]), [outside, outside]),
        (json!(lincoln), [outside, outside]),
        (json!({}), [outside, outside]),
    ];
    for (metadata, expected) in cases {
        let tenant = json!({"role": "tenant", "app_metadata": metadata});
        let token = key.token(&claims(&tenant));
        let said = [
            ask_about(&server, &token, "lincoln", "ann").await,
            ask_about(&server, &token, "franklin", "ann").await,
        ];
        assert_eq!(said, expected, "{metadata}");
        // An organization that does not exist is one outside.
        let nowhere = ask_all(&server, &token, "nowhere", "ann").await;
        let organizations = expected.iter().filter(|said| **said == ALLOWED).count();
        let listed = format!("{organizations} organizations");
        let expected = [outside, DENIED_ITEM, outside, &listed, outside, outside];
        assert_eq!(nowhere, expected, "{metadata}");
    }
}

/// An RSA key that is too short, and a token that it did sign, in every other respect a good one.
const WEAK_MODULUS: &str = "shq2Nrt4ptj00ENREenwPQN6VWxwDTCs2VMDkMRt_xaSqczybQQZb_TlSLpxgqcQqqkaYcx3ByYhbDR7ljrDjm9MfHq5kj_YXzXV0u4kLsxMUjx09zr9a0qHDnvErarat4pihqe96SLpoEfcu5AKGVCxNS5VXKPh9hsvoRxQBjM";
const WEAK_TOKEN: &str = "eyJhbGciOiJSUzI1NiIsImtpZCI6IndlYWsifQ.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlL2F1dGgvdjEiLCJhdWQiOiJhdXRoZW50aWNhdGVkIiwic3ViIjoiYmFja2VuZCIsInJvbGUiOiJzZXJ2aWNlX3JvbGUiLCJleHAiOjQxMDI0NDQ4MDB9.ffOPlEFmyHz8Vj9EQew-LzfqFMIXkb04lN7vD_8lwrlqio5cvu2o-PbU3_uKYuXulnszxsjgF1a3CJybNOJxhzCMOEPyL6uI7e4lSR3oTc0OdI_ehP9Jb5Yz_Ygr0-1x4QBqhWOMMfQrUSXTKGkvF6cWlv-SfYGptc1XosE5x4w";
