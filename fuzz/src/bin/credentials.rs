//! Credentials: whatever the `authorization` headers say (one a line), nobody gets in who was given no credential, and an
//! API key has one spelling.

#![no_main]

use std::{cell::LazyCell, time::Duration};

use hallpass::auth::{
    Authentication, Authenticator, Peer,
    api_key::{ApiKey, Pepper},
    certificates::Certificates,
    grants::Grants,
    keys::{ApiKeys, Timing},
    tokens::{KeySource, Pace, TokenRules, Tokens},
};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static CALLERS: LazyCell<(Runtime, Authenticator)> = LazyCell::new(start);
}

/// Every way to be known, with credentials that nobody has.
fn start() -> (Runtime, Authenticator) {
    // Who waits for the issuer's keys is told at once that they have not come.
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let timing = Timing {
        staleness_bound: Duration::from_secs(2),
        staleness_ceiling: Duration::from_secs(300),
        record_interval: Duration::from_secs(60),
    };
    let grants = Grants::parse("").expect("grants");
    let rules = TokenRules {
        issuer: "https://issuer.example".to_owned(),
        audience: "hallpass".to_owned(),
        leeway: Duration::ZERO,
        grants: grants.clone(),
    };
    let source = KeySource::new("/nonexistent", None).expect("a source");
    let authenticator = Authenticator::default()
        .with_keys(ApiKeys::new(timing, Pepper::default()))
        .with_certificates(Certificates::new(&grants))
        .with_tokens(Tokens::new(rules, source, Pace::default()));
    (runtime, authenticator)
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
        let outcome = match authenticator.authenticate(&headers, &Peer::default()) {
            Authentication::Known(outcome) => outcome,
            Authentication::Pending(outcome) => runtime.block_on(outcome),
            Authentication::Unverified(token) => match token.verify() {
                Authentication::Known(outcome) => outcome,
                Authentication::Pending(outcome) => runtime.block_on(outcome),
                Authentication::Unverified(_) => panic!("it was verified"),
            },
        };
        assert!(outcome.is_err(), "{outcome:?}");
    });
    if let Ok(text) = std::str::from_utf8(input)
        && let Some(key) = ApiKey::parse(text)
    {
        assert_eq!(key.reveal(), text);
    }
});
