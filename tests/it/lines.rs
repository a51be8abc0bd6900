//! What the service logs of calls that it refuses: one line each, not too many, and nothing that a caller wrote.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use hallpass::auth::{Authenticator, Caller, Identity};
use hallpass_client::{
    tonic::{Code, IntoRequest, metadata::MetadataValue},
    v1::CheckPermissionRequest,
};
use tracing_subscriber::fmt::MakeWriter;

use crate::{
    database::Database,
    names::id,
    server::{Server, config, fill},
};

/// What a caller would have an operator believe.
const FORGED: &str = "forged";

/// Takes what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Lines {
    /// The lines about calls, since the last time.
    fn take(&self) -> Vec<String> {
        let text = String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap();
        let lines = text.split_terminator('\n').map(str::to_owned);
        lines
            .filter(|line| line.contains("refused or failed") || line.contains(FORGED))
            .collect()
    }
}

/// The tests' runtimes have one thread, and the service runs on it.
fn record() -> (Lines, tracing::subscriber::DefaultGuard) {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(lines.clone())
        .finish();
    (lines, tracing::subscriber::set_default(subscriber))
}

fn junk() -> [String; 4] {
    [
        format!("x\n2026-01-01T00:00:00Z  WARN hallpass: {FORGED}"),
        format!("x\r{FORGED}\u{1b}[2K\u{1b}[31m"),
        format!("\u{85}\u{2028}\u{9b}31m{FORGED}\u{202e}"),
        format!("{FORGED}{}", "x".repeat(1_000)),
    ]
}

#[tokio::test]
async fn no_caller_writes_into_the_log() {
    let (lines, _guard) = record();
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let closed = Server::start(hallpass::server::Config {
        authenticator: Arc::new(Authenticator::default()),
        ..config(&database.url)
    })
    .await;
    lines.take();
    let mut calls = 0;
    for junk in junk() {
        let asked = CheckPermissionRequest {
            organization_id: junk.clone(),
            user_id: junk.clone(),
            permission: junk.repeat(3),
            ..CheckPermissionRequest::default()
        };
        for server in [&server, &closed] {
            let mut request = asked.clone().into_request();
            let metadata = request.metadata_mut();
            // Opaque bytes are all that a header may hold of it.
            let opaque: Vec<u8> = junk
                .bytes()
                .map(|byte| if byte < 0x20 { 0x9b } else { byte })
                .collect();
            for name in [
                "user-agent",
                "x-request-id",
                "x-forwarded-for",
                "authorization",
            ] {
                metadata.insert(name, MetadataValue::try_from(opaque.as_slice()).unwrap());
            }
            server.try_check(request).await.unwrap_err();
            calls += 1;
        }
    }
    let logged = lines.take();
    assert_eq!(logged.len(), calls, "{logged:#?}");
    for line in logged {
        assert!(!line.contains(FORGED), "{line}");
        assert!(
            line.len() < 300 && line.chars().all(|c| (' '..='~').contains(&c)),
            "{line:?}"
        );
        assert!(
            line.contains("method=\"/hallpass.v1.PermissionService/CheckPermission\""),
            "{line}"
        );
        assert!(line.contains("address=127.0.0.1"), "{line}");
    }
    server.stop().await;
    closed.stop().await;
}

#[tokio::test]
async fn a_flood_of_refusals_is_a_few_lines_that_say_how_many_were_left_out() {
    let (lines, _guard) = record();
    let database = Database::create().await;
    let server = Server::start(config(&database.url)).await;
    lines.take();
    let mut logged = Vec::new();
    let mut calls: u64 = 0;
    // Lines come again once a second.
    while calls < 500 || logged.len() < 11 {
        let asked = CheckPermissionRequest {
            organization_id: id("lincoln").to_string(),
            ..CheckPermissionRequest::default()
        };
        let status = server.try_check(asked).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        calls += 1;
        logged.extend(lines.take());
    }
    let left_out = |line: &String| {
        line.rsplit("left_out=")
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let mentioned: u64 = logged.iter().map(left_out).sum();
    let counted = mentioned + u64::try_from(logged.len()).unwrap();
    // What was left out since the last line is mentioned by the next.
    assert!(
        mentioned > 0 && counted <= calls,
        "{mentioned} of {calls}: {logged:#?}"
    );
    server.stop().await;
}

#[test]
fn an_identity_is_one_line() {
    for junk in junk() {
        for identity in [
            Identity::Token(junk.as_str().into()),
            Identity::Certificate(junk.as_str().into()),
        ] {
            let caller = Caller {
                identity,
                ..Caller::clone(&Caller::anyone())
            };
            let shown = caller.identity.to_string();
            assert!(!shown.contains(char::is_control), "{shown:?}");
        }
    }
}
