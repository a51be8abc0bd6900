//! Credentials: whatever the `authorization` headers say (one a line), nobody gets in who was given no credential, and an
//! API key has one spelling. There are a key and an issuer's keys to be met; nobody has the secret of any of them.

#![no_main]

use std::{
    cell::LazyCell,
    env, fs, process,
    time::{Duration, SystemTime},
};

use hallpass::{
    auth::{
        AuthError, Authentication, Authenticator, Peer,
        access::Need,
        api_key::{ApiKey, Pepper},
        certificates::Certificates,
        grants::Grants,
        keys::{ApiKeys, Timing},
        tokens::{KeySource, Pace, TokenRules, Tokens},
    },
    model::BootTime,
    store::api_keys::{Edition, KeysState, StoredKey},
};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

thread_local! {
    static CALLERS: LazyCell<(Runtime, Authenticator)> = LazyCell::new(start);
}

/// Longer than anybody makes up input: what is known at the start is believed to the end.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The issuer's keys, by the ids that the corpus names; their private halves are gone.
const JWKS: &str = r#"{"keys": [
    {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "alg": "EdDSA", "use": "sig",
     "x": "unwAOd3Z4QN78a1_WW_tFrfRTOPGuoS8ZGpiFFm7MJk"},
    {"kty": "EC", "crv": "P-256", "kid": "ec", "alg": "ES256", "use": "sig",
     "x": "rn3tjZzuoXSCpFcFrhBb5UZNNifDlgS0joV7n3OJrUg", "y": "vcvjPIjqXaQWzd5lcwfX9FG_ee5fdy6121yuds0aqUU"}
]}"#;

/// The key of the corpus; its hash is that of no secret that anybody knows.
fn stored_key() -> StoredKey {
    StoredKey {
        id: "abcdefghijklmnop".to_owned(),
        hash: vec![7; 32],
        scopes: vec!["check".to_owned()],
        organizations: None,
        expires_at: None,
        is_revoked: false,
    }
}

/// Every way to be known, with credentials that nobody has.
fn start() -> (Runtime, Authenticator) {
    // Who waits for a key of the issuer's is told at once that it has not come.
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let timing = Timing {
        staleness_bound: DAY,
        staleness_ceiling: DAY,
        record_interval: DAY,
    };
    let keys = ApiKeys::new(timing, Pepper::default());
    let state = KeysState {
        edition: Edition::default(),
        clock: SystemTime::UNIX_EPOCH,
    };
    keys.take(vec![stored_key()], state, BootTime::now());
    let grants = Grants::parse("").expect("grants");
    let rules = TokenRules {
        issuer: "https://issuer.example".to_owned(),
        audience: "hallpass".to_owned(),
        leeway: Duration::ZERO,
        grants: grants.clone(),
    };
    let path = env::temp_dir().join(format!("hallpass-fuzz-{}.json", process::id()));
    fs::write(&path, JWKS).expect("a place for the issuer's keys");
    let source = KeySource::new(path.to_str().expect("a name"), None).expect("a source");
    let pace = Pace {
        age_max: DAY,
        ..Pace::default()
    };
    let tokens = Tokens::new(rules, source, pace);
    // As long as it takes to read them once.
    runtime.block_on(async {
        let read = timeout(pace.file_interval / 2, tokens.clone().follow()).await;
        assert!(read.is_err(), "following ends never");
    });
    fs::remove_file(&path).expect("the issuer's keys");
    let authenticator = Authenticator::default()
        .with_keys(keys)
        .with_certificates(Certificates::new(&grants))
        .with_tokens(tokens);
    for known in [
        include_str!("../../corpus/credentials/wrong_secret"),
        include_str!("../../corpus/credentials/forged_eddsa"),
        include_str!("../../corpus/credentials/forged_es256"),
    ] {
        let mut headers = HeaderMap::new();
        headers.append(AUTHORIZATION, HeaderValue::from_static(known));
        let outcome = look(&authenticator, &headers);
        let is_met = matches!(outcome, Authentication::Known(Err(AuthError::Invalid)));
        assert!(is_met, "{known} meets no key");
    }
    (runtime, authenticator)
}

/// All that is found out without a wait.
fn look(authenticator: &Authenticator, headers: &HeaderMap) -> Authentication {
    match authenticator.authenticate(headers, &Peer::default(), Need::Credential) {
        Authentication::Unverified(token) => token.verify(),
        found => found,
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut headers = HeaderMap::new();
    for line in input.split(|byte| *byte == b'\n') {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(AUTHORIZATION, value);
        }
    }
    CALLERS.with(|callers| {
        let (runtime, authenticator) = &**callers;
        let outcome = match look(authenticator, &headers) {
            Authentication::Known(outcome) => outcome,
            Authentication::Pending(outcome) => runtime.block_on(outcome),
            Authentication::Unverified(_) => unreachable!("it was verified"),
        };
        assert!(outcome.is_err(), "{outcome:?}");
    });
    if let Ok(text) = std::str::from_utf8(input)
        && let Some(key) = ApiKey::parse(text)
    {
        assert_eq!(key.reveal(), text);
    }
});
