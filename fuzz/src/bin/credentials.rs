//! Credentials: whatever the `authorization` headers say (one a line), nobody gets in who was given no credential.

#![no_main]

use hallpass::auth::{Authentication, Authenticator, Peer};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut headers = HeaderMap::new();
    for line in input.split(|byte| *byte == b'\n') {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(AUTHORIZATION, value);
        }
    }
    // Each way of knowing callers that needs no other machine belongs here, with credentials that nobody has.
    let authenticator = Authenticator::default();
    match authenticator.authenticate(&headers, &Peer::default()) {
        Authentication::Known(outcome) => assert!(outcome.is_err(), "{outcome:?}"),
        Authentication::Pending(_) => panic!("nothing here has to be fetched"),
    }
});
