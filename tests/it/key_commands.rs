//! `hallpass keys`, `serve --auth` and `--token`, as their users run them; and that no secret is ever logged.

use std::{fs, path::Path, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;

use crate::{
    commands::{Ran, command, finish, hallpass},
    database::{Database, as_role, eventually},
    keyring::{Made, key_id, revoke},
    names::id,
    server::{APPROVE, fill},
    sql::lines,
    support::{HALLPASS, temporary_directory},
};

/// `hallpass keys` as who may.
async fn keys(database: &Database, arguments: &[&str]) -> Ran {
    keys_as(database, "hallpass_migrator", arguments).await
}

async fn keys_as(database: &Database, role: &str, arguments: &[&str]) -> Ran {
    let mut command = command(HALLPASS);
    let url = as_role(&database.url, role);
    command
        .arg("keys")
        .args(arguments)
        .env("HALLPASS_DATABASE_URL", url);
    finish(command).await
}

/// A service that asks for keys at a socket of its directory, and logs all it can to a file there.
struct Service {
    child: Child,
    directory: tempfile::TempDir,
}

impl Service {
    fn start(database: &Database, arguments: &[&str]) -> Self {
        let directory = temporary_directory();
        let socket = directory.path().join("socket");
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let mut command = command(HALLPASS);
        command
            .args(["serve", "--auth", "api-key"])
            .args(arguments)
            .env(
                "HALLPASS_DATABASE_URL",
                as_role(&database.url, "hallpass_service"),
            )
            .env("HALLPASS_GRPC_LISTEN", format!("unix:{}", socket.display()))
            .env("HALLPASS_LAME_DUCK", "10ms")
            .env("RUST_LOG", "trace")
            .stdout(Stdio::null())
            .stderr(log);
        let child = command.spawn().unwrap();
        Self { child, directory }
    }

    /// Asks whether bob of lincoln may, with this in HALLPASS_TOKEN.
    async fn check(&self, token: Option<&str>) -> Ran {
        let socket = self.directory.path().join("socket");
        let mut command = command(HALLPASS);
        command.args([
            "check",
            &id("lincoln").to_string(),
            &id("bob").to_string(),
            APPROVE,
        ]);
        command.env("HALLPASS_ENDPOINT", format!("unix:{}", socket.display()));
        command.envs(token.map(|token| ("HALLPASS_TOKEN", token)));
        finish(command).await
    }

    async fn until_said(&self, token: &str, expected: &str) {
        eventually(expected, async || {
            let ran = self.check(Some(token)).await;
            ran.out.contains(expected) || ran.err.contains(expected)
        })
        .await;
    }

    async fn stop(mut self) -> String {
        let pid = Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        self.child.wait().await.unwrap();
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }
}

fn pepper_file(directory: &Path) -> String {
    let path = directory.join("pepper");
    fs::write(&path, format!("{}\n", "0123456789abcdef".repeat(4))).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_key_is_made_used_listed_and_revoked_and_nobody_logs_it() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let directory = temporary_directory();
    let pepper = pepper_file(directory.path());
    let pepper = ["--api-key-pepper-file", pepper.as_str()];
    let lincoln = id("lincoln").to_string();
    let create = [
        "create",
        "the website",
        "--scopes",
        "list,check",
        "--organizations",
        &lincoln,
    ];
    let expires = ["--expires", "90d"];
    let made = keys(&database, &[&create[..], &expires, &pepper].concat()).await;
    assert_eq!(made.code, 0, "{made:?}");
    // The key, and nothing else, so that it can be put into a file.
    let key = made.out.trim_end().to_owned();
    assert_eq!(made.out, format!("{key}\n"));
    assert_eq!(key.len(), 84);
    assert!(
        !made.err.contains(&key) && made.err.contains("expires at 2"),
        "{made:?}"
    );
    assert!(
        made.err
            .contains(&format!("hallpass keys revoke {}", key_id(&key)))
    );
    let unpeppered = Made::default().make(&database.url).await;

    let service = Service::start(&database, &pepper);
    service.until_said(&key, "allow  GRANTED_BY_ROLE").await;
    let nobody = service.check(None).await;
    assert!(
        nobody.err.contains("UNAUTHENTICATED: no credential"),
        "{nobody:?}"
    );
    let stranger = service.check(Some(&unpeppered)).await;
    assert!(
        stranger
            .err
            .contains("UNAUTHENTICATED: the credential is not valid here"),
        "{stranger:?}"
    );
    let malformed = service.check(Some("hp_\n")).await;
    malformed.assert_one_line("--token: has characters that no credential has");

    let secret = key.rsplit('_').next().unwrap();
    let listed = keys(&database, &["list"]).await;
    assert_eq!((listed.code, &*listed.err), (0, ""), "{listed:?}");
    let rows: Vec<&str> = listed.out.lines().collect();
    assert!(
        rows[0].starts_with("ID                NAME         SCOPES"),
        "{listed:?}"
    );
    assert_eq!(rows.len(), 3, "{listed:?}");
    let row = rows
        .iter()
        .find(|row| row.starts_with(key_id(&key)))
        .unwrap();
    assert!(
        row.contains("the website  check,list  ") && row.contains(&lincoln),
        "{row}"
    );
    assert!(row.ends_with("valid"), "{row}");
    assert!(!listed.out.contains(secret));
    let made_by = "SELECT DISTINCT created_by FROM hallpass.api_keys";
    assert_eq!(lines(&client, made_by).await, ["hallpass_migrator"]);

    let revoked = keys(&database, &["revoke", key_id(&key)]).await;
    assert_eq!(revoked.code, 0, "{revoked:?}");
    service
        .until_said(&key, "UNAUTHENTICATED: the credential has been revoked")
        .await;
    let again = keys(&database, &["revoke", &key]).await;
    assert_eq!(
        (again.code, again.out.contains("before")),
        (0, true),
        "{again:?}"
    );
    assert!(!again.out.contains(secret), "{again:?}");
    let listed = keys(&database, &["list"]).await;
    assert!(listed.out.contains(" revoked\n"), "{listed:?}");

    let log = service.stop().await;
    assert!(log.contains("read the API keys"), "{log}");
    for secret in [secret, &unpeppered[20..], "0123456789abcdef0123"] {
        assert!(!log.contains(secret), "the log has a secret");
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_key_to_be_made_is_said() {
    let database = Database::create().await;
    let lincoln = id("lincoln").to_string();
    let all: &[&str] = &["--scopes", "check", "--organizations", "all"];
    let cases: [(&[&str], &str); 9] = [
        (&["create", "x", "--organizations", "all"], "--scopes"),
        // Whoever wants all says so.
        (&["create", "x", "--scopes", "check"], "--organizations"),
        (
            &["create", "x", "--scopes", "chek", "--organizations", "all"],
            "`chek` is no scope",
        ),
        (
            &["create", "x", "--scopes", "", "--organizations", "all"],
            "`` is no scope",
        ),
        (
            &[
                "create",
                "x",
                "--scopes",
                "check",
                "--organizations",
                "lincoln",
            ],
            "`lincoln` is no UUID",
        ),
        (
            &[
                "create",
                "",
                "--scopes",
                "check",
                "--organizations",
                &lincoln,
            ],
            "1 to 100 characters",
        ),
        (
            &[
                "create",
                "a\nb",
                "--scopes",
                "check",
                "--organizations",
                &lincoln,
            ],
            "1 to 100 characters",
        ),
        (&["create", "x", "--expires", "0d"], "--expires"),
        (
            &["revoke", "nosuchkey"],
            "no API key has the id `nosuchkey`",
        ),
    ];
    for (arguments, expected) in cases {
        let ran = keys(&database, arguments).await;
        assert_eq!((ran.code, &*ran.out), (2, ""), "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(expected), "{arguments:?}: {ran:?}");
    }
    let create = [&["create", "x"], all].concat();
    let may_not = "this login may not manage API keys";
    keys_as(&database, "hallpass_service", &create)
        .await
        .assert_one_line(may_not);
    keys_as(&database, "hallpass_auditor", &["list"])
        .await
        .assert_one_line(may_not);
    let empty = Database::empty().await;
    keys_as(&empty, "hallpass", &create)
        .await
        .assert_one_line("run `hallpass migrate` first");
    let directory = temporary_directory();
    let short = directory.path().join("short");
    fs::write(&short, "too short").unwrap();
    let short = short.to_str().unwrap();
    for (file, expected) in [
        (short, "must hold 32 to 4096 bytes"),
        ("/none", "No such file"),
    ] {
        let ran = keys(
            &database,
            &[&create[..], &["--api-key-pepper-file", file]].concat(),
        )
        .await;
        ran.assert_one_line("--api-key-pepper-file");
        ran.assert_one_line(expected);
    }
    let none = "SELECT count(*) FROM hallpass.api_keys";
    assert_eq!(lines(&database.client().await, none).await, ["0"]);
}

#[tokio::test]
async fn a_service_that_anybody_can_reach_asks_who_calls_or_does_not_start() {
    let cases: [(&[&str], &str); 6] = [
        (&["--grpc-listen", "0.0.0.0:0"], "--auth api-key"),
        (
            &["--grpc-listen", "[::]:0", "--auth", "none"],
            "--auth api-key",
        ),
        (&["--auth", "none,api-key"], "--auth none lets everybody in"),
        (&["--auth", "jwt"], "--auth jwt"),
        (&["--auth", "mtls"], "--auth mtls"),
        (
            &["--api-key-pepper-file", "/x"],
            "of no use without --auth api-key",
        ),
    ];
    for (arguments, expected) in cases {
        hallpass(&[&["serve"], arguments].concat())
            .await
            .assert_one_line(expected);
    }
    let unknown = hallpass(&["serve", "--auth", "password"]).await;
    assert_eq!(unknown.code, 2);
    assert!(
        unknown.err.contains("must be of: none, api-key, jwt, mtls"),
        "{unknown:?}"
    );
}

/// What the environment holds is not what a help text shows.
#[tokio::test]
async fn help_shows_no_secret() {
    let mut help = command(HALLPASS);
    help.args(["check", "--help"])
        .env("HALLPASS_TOKEN", "hp_secret");
    let help = finish(help).await;
    assert!(
        help.out.contains("HALLPASS_TOKEN") && !help.out.contains("hp_secret"),
        "{help:?}"
    );
}

/// A revoked key is listed as such even where it has expired too, and use where there was some.
#[tokio::test]
async fn a_list_says_how_each_key_stands() {
    let database = Database::create().await;
    let url = &database.url;
    let empty = keys(&database, &["list"]).await;
    assert_eq!(empty.out.lines().count(), 1, "{empty:?}");
    let several = Made {
        organizations: Some(vec![id("a"), id("b")]),
        ..Made::default()
    };
    let (several, expired) = (several.make(url).await, Made::expired().make(url).await);
    let both = Made::expired().make(url).await;
    revoke(url, &both).await;
    let listed = keys(&database, &["list"]).await;
    let row = |key: &str| {
        let row = listed
            .out
            .lines()
            .find(|row| row.starts_with(key_id(key)))
            .unwrap();
        row.split("  ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .collect::<Vec<_>>()
    };
    let cells = row(&several);
    assert_eq!(cells[3], "2 of them", "{listed:?}");
    assert_eq!(cells[5..], ["never", "never", "valid"], "{listed:?}");
    assert_eq!(row(&expired)[7], "expired", "{listed:?}");
    assert_eq!(row(&both)[7], "revoked", "{listed:?}");
}
