//! What a running service writes to standard error: one line an event, and no password.

use std::{fs, process::Stdio};

use hallpass_client::v1::{
    ListPermissionHoldersRequest, permission_service_client::PermissionServiceClient,
};
use tokio::process::Command;

use crate::{
    database::{Database, as_role, eventually},
    names::id,
    server::fill,
    support::{HALLPASS, temporary_directory},
};

/// Makes the database's complaint repeat what the caller said.
const COMPLAIN: &str = "
DO $$
DECLARE
    definition text := pg_get_functiondef('hallpass.permission_holders(uuid, text, uuid, integer)'::regprocedure);
BEGIN
    EXECUTE replace(definition, E'\nBEGIN\n', E'\nBEGIN\n    RAISE EXCEPTION ''no such key: %'', asked_permission_key;\n');
END $$";

/// A key that would be a line of the log, after one that is wiped from the terminal.
const FORGED: &str =
    "can\n2026-01-01T00:00:00Z ERROR forged\r\u{1b}[2K\u{9b}31mred\u{85}\u{7}\u{8}";

const PASSWORD: &str = "open-sesame";

#[tokio::test]
async fn input_makes_no_line_of_the_log_and_passwords_are_not_in_it() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    client.batch_execute(COMPLAIN).await.unwrap();
    let directory = temporary_directory();
    let (socket, log) = (
        directory.path().join("socket"),
        directory.path().join("log"),
    );
    let url = as_role(&database.url, "hallpass_service");
    let mut service = Command::new(HALLPASS)
        .args(["serve", "--lame-duck=0ms", "--database-url"])
        .arg(format!("{url}&password={PASSWORD}"))
        .arg(format!("--grpc-listen=unix:{}", socket.display()))
        .arg("--http-listen=none")
        .arg("--ops-listen=none")
        .env("RUST_LOG", "trace")
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let read = || fs::read_to_string(&log).unwrap();
    eventually("the service is ready", async || read().contains(" ready ")).await;

    let endpoint = format!("unix:{}", socket.display());
    let channel = hallpass_client::connect(&endpoint).await.unwrap();
    let request = ListPermissionHoldersRequest {
        organization_id: id("lincoln").to_string(),
        permission: FORGED.to_owned(),
        ..ListPermissionHoldersRequest::default()
    };
    let asked = PermissionServiceClient::new(channel)
        .list_permission_holders(request)
        .await;
    asked.unwrap_err();
    eventually("the complaint is logged", async || {
        let has = |line: &str| line.contains("WARN") && line.contains("no such key");
        read().lines().any(has)
    })
    .await;
    service.kill().await.unwrap();

    let log = read();
    for line in log.split_terminator('\n') {
        assert!(line.starts_with("20"), "{line:?}");
        assert!(!line.starts_with("2026-01-01T00:00:00Z"), "{line:?}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
    assert!(!log.contains(PASSWORD), "{log}");
}

/// A statement of the sampler's that fails, and counts how often.
const FAIL: &str = "
CREATE SEQUENCE public.samples;
CREATE FUNCTION public.to_char(timestamp, text) RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM nextval('public.samples');
    RAISE EXCEPTION 'not today';
END $$;
DO $$
BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$";

/// What alerts lean on does not go blind in silence, nor with a line for each attempt.
#[tokio::test]
async fn a_sample_that_fails_is_said_once_a_reason() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    client.batch_execute(FAIL).await.unwrap();
    let directory = temporary_directory();
    let log = directory.path().join("log");
    let mut service = Command::new(HALLPASS)
        .args(["serve", "--lame-duck=0ms", "--database-url"])
        .arg(as_role(&database.url, "hallpass_service"))
        .arg(format!(
            "--grpc-listen=unix:{}",
            directory.path().join("socket").display()
        ))
        .args(["--http-listen=none", "--ops-listen=none"])
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    eventually("it was tried twice", async || {
        let row = client
            .query_one("SELECT last_value FROM public.samples", &[])
            .await;
        row.unwrap().get::<_, i64>(0) >= 2
    })
    .await;
    let log = fs::read_to_string(&log).unwrap();
    let said: Vec<_> = log
        .lines()
        .filter(|line| line.contains("the database was not sampled"))
        .collect();
    assert_eq!(said.len(), 1, "{log}");
    assert!(
        said[0].contains("WARN") && said[0].contains("not today"),
        "{said:?}"
    );
    service.kill().await.unwrap();
}
