//! Settings from a file, the environment and flags, through the real program; and what SIGHUP takes over.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::Child;

use crate::{
    commands::{Ran, command, finish},
    database::{Database, as_role, eventually},
    names::id,
    server::{APPROVE, fill},
    support::{HALLPASS, temporary_directory},
    web::Web,
};

/// `serve` with this file and these variables and flags.
async fn serve(file: &str, variables: &[(&str, &str)], flags: &[&str]) -> Ran {
    let directory = temporary_directory();
    let path = directory.path().join("hallpass.toml");
    fs::write(&path, file).unwrap();
    let mut serve = command(HALLPASS);
    serve
        .env_remove("HALLPASS_HTTP_LISTEN")
        .env_remove("HALLPASS_OPS_LISTEN");
    serve
        .envs(variables.iter().copied())
        .current_dir(directory.path());
    serve
        .args(["serve", "--config", "hallpass.toml"])
        .args(flags);
    finish(serve).await
}

#[tokio::test]
async fn a_flag_beats_the_environment_and_that_the_file() {
    let file = "grpc-listen = \"127.0.0.1:1\"\nhttp-listen = \"127.0.0.1:2\"\nops-listen = \"127.0.0.1:3\"\n\
        auth = [\"api-key\", \"jwt\"]\njwt-issuer = \"i\"\njwt-audience = \"a\"\njwt-jwks = \"https://i/k\"\ngrants = \"g\"\n\
        caller-rate-max = 5_000\ntrace-sample = 0.5\ndatabase-url = \"postgresql://u:open-sesame@h/d\"\n";
    let variables = [
        ("HALLPASS_HTTP_LISTEN", "127.0.0.1:4"),
        ("HALLPASS_OPS_LISTEN", "127.0.0.1:5"),
    ];
    let ran = serve(file, &variables, &["--print-config", "--ops-listen=none"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    for line in [
        "grpc-listen = \"127.0.0.1:1\" # hallpass.toml:1",
        "http-listen = \"127.0.0.1:4\" # HALLPASS_HTTP_LISTEN",
        "ops-listen = \"none\" # flag",
        "auth = \"api-key,jwt\" # hallpass.toml:4",
        "caller-rate-max = 5000 # hallpass.toml:9",
        "trace-sample = \"0.5\" # hallpass.toml:10",
        "# database-url = \"postgresql://u:***@h/d\" # hallpass.toml:11",
        "staleness-bound = \"2s\" # default",
        "# admin-database-url is not set",
    ] {
        assert!(
            ran.out.lines().any(|printed| printed == line),
            "{line}: {}",
            ran.out
        );
    }
    assert!(!format!("{ran:?}").contains("sesame"), "{ran:?}");
    // What is printed says the same as a file.
    let again = serve(&ran.out, &[], &["--print-config"]).await;
    let values = |printed: &str| -> Vec<String> {
        let value = |line: &str| line.split(" # ").next().unwrap().to_owned();
        let is_set = |line: &&str| !line.starts_with('#');
        printed.lines().filter(is_set).map(value).collect()
    };
    assert_eq!(values(&again.out), values(&ran.out), "{again:?}");
}

#[tokio::test]
async fn everything_that_is_wrong_is_said_at_once() {
    let file = "grpc-listn = \"127.0.0.1:1\"\nstaleness-bound = 2\nauth = [\"api-key\", \"basic\"]\n\
        caller-rate-max = \"many\"\nprint-config = true\n[limits]\nlog-format = \"xml\"\n";
    let ran = serve(
        file,
        &[
            ("HALLPASS_LAME_DUCK", "soon"),
            ("HALLPASS_OPS_LISTE", "none"),
            ("HALLPASS_SERVICE_HOST", "10.0.0.1"),
        ],
        &[],
    )
    .await;
    assert_eq!((ran.code, &*ran.out), (2, ""), "{ran:?}");
    let mut lines: Vec<&str> = ran.err.lines().map(str::trim).collect();
    assert_eq!(lines.remove(0), "hallpass: 8 settings cannot be used");
    lines.sort_unstable();
    let expected = [
        "HALLPASS_LAME_DUCK: `soon` is not a duration: a whole number and ms, s, m, h or d",
        "HALLPASS_OPS_LISTE: no such setting; did you mean HALLPASS_OPS_LISTEN?",
        "hallpass.toml:1: `grpc-listn`: no such setting; did you mean `grpc-listen`?",
        "hallpass.toml:2: `staleness-bound`: `2` is not a duration: a whole number and ms, s, m, h or d",
        "hallpass.toml:3: `auth`: `api-key,basic` is no value for it: must be of: none, api-key, jwt, mtls",
        "hallpass.toml:4: `caller-rate-max`: `many` is no value for it: invalid digit found in string",
        "hallpass.toml:5: `print-config`: no such setting",
        "hallpass.toml:6: `limits`: no such setting; did you mean `grants`?",
    ];
    assert_eq!(lines, expected);
    let missing = serve("", &[], &["--config=nowhere.toml"]).await;
    assert_eq!(missing.code, 2, "{missing:?}");
}

/// A service that logs to a file.
struct Service {
    child: Child,
    log: std::path::PathBuf,
}

impl Service {
    fn start(directory: &Path, url: &str) -> Self {
        let log = directory.join("log");
        let mut serve = command(HALLPASS);
        serve.current_dir(directory);
        serve
            .env_remove("HALLPASS_HTTP_LISTEN")
            .env_remove("HALLPASS_OPS_LISTEN");
        serve.args(["serve", "--config", "hallpass.toml", "--database-url", url]);
        serve
            .stderr(fs::File::create(&log).unwrap())
            .stdout(Stdio::null());
        let child = serve.spawn().unwrap();
        Self { child, log }
    }

    fn lines(&self) -> Vec<Value> {
        let log = fs::read_to_string(&self.log).unwrap();
        let line = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
        };
        log.lines().map(line).collect()
    }

    /// The first line with this message, once there are so many.
    async fn says(&self, message: &str, count: usize) -> Value {
        let said = || {
            let lines = self.lines().into_iter();
            let said = lines.filter(|line| {
                line["message"]
                    .as_str()
                    .unwrap_or_default()
                    .starts_with(message)
            });
            said.collect::<Vec<_>>()
        };
        eventually(message, async || said().len() >= count).await;
        said().swap_remove(count - 1)
    }

    fn hang_up(&self) {
        let pid = Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        kill_process(pid, Signal::HUP).unwrap();
    }
}

#[tokio::test]
async fn a_hangup_takes_over_what_it_can_and_a_mistake_changes_nothing() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let directory = temporary_directory();
    let path = directory.path().join("hallpass.toml");
    let key = crate::keyring::Made::default().make(&database.url).await;
    let write = |more: &str| {
        let file = format!(
            "log-format = \"json\"\nhttp-listen = \"127.0.0.1:0\"\ngrpc-listen = \"127.0.0.1:0\"\nops-listen = \"none\"\nauth = \"api-key\"\n{more}"
        );
        fs::write(&path, file).unwrap();
    };
    write("caller-rate-max = 0");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let service = Service::start(
        directory.path(),
        &as_role(&database.url, "hallpass_service"),
    );
    service.says("ready", 1).await;
    let lines = service.lines();
    let address = |protocol: &str| {
        let line = lines
            .iter()
            .find(|line| line["message"] == "listening" && line["protocol"] == protocol);
        line.unwrap()["address"]
            .as_str()
            .unwrap()
            .parse::<std::net::SocketAddr>()
            .unwrap()
    };
    let web = Web::at(address("HTTP")).with("authorization", format!("Bearer {key}"));
    let question = serde_json::json!({"organization_id": id("lincoln").to_string(),
        "user_id": id("ann").to_string(), "permission": APPROVE});
    let status = async || web.post("/v1/check", &question).await.status.as_u16();
    for _ in 0..20 {
        assert_eq!(status().await, 200);
    }

    write("caller-rate-max = 1\nlame-duck = \"3s\"\nlog-level = \"debug\"");
    service.hang_up();
    let changed = service.says("changed", 1).await;
    let rest = service.says("changes when", 1).await;
    assert_eq!(changed["setting"], "caller-rate-max");
    assert_eq!(
        (&changed["was"], &changed["now"]),
        (&"0".into(), &"1".into())
    );
    assert_eq!(rest["setting"], "lame-duck");
    service.says("changed", 2).await;
    eventually("the rate holds", async || status().await == 429).await;

    write("caller-rate-max = 0\ncaller-rate-min = 1\nlame-duck = 3");
    service.hang_up();
    service.says("settings are not reloaded", 3).await;
    eventually("the rate holds still", async || status().await == 429).await;

    // Each alone is good; together they would not start.
    for (index, more) in [
        "staleness-ceiling = \"1s\"",
        "admin-database-url = \"mysql://h/d\"",
    ]
    .into_iter()
    .enumerate()
    {
        write(&format!("caller-rate-max = 0\n{more}"));
        service.hang_up();
        service.says("settings are not reloaded", 4 + index).await;
        eventually("the rate holds still", async || status().await == 429).await;
    }

    write("caller-rate-max = 0");
    service.hang_up();
    // The rate and the level, back again.
    service.says("changed", 4).await;
    eventually("there is no rate", async || status().await == 200).await;
    for _ in 0..20 {
        assert_eq!(status().await, 200);
    }
}

/// A flag may stand before the command.
#[tokio::test]
async fn the_log_says_as_much_and_in_the_form_that_was_asked_for() {
    let directory = temporary_directory();
    fs::write(
        directory.path().join("hallpass.toml"),
        "log-format = \"pretty\"\nlog-level = \"off\"",
    )
    .unwrap();
    let mut serve = command(HALLPASS);
    serve.current_dir(directory.path());
    serve.args([
        "--log-format=json",
        "--log-level",
        "debug",
        "serve",
        "--config=hallpass.toml",
        "--print-config",
    ]);
    let ran = finish(serve).await;
    assert!(
        ran.out.contains("log-format = \"json\" # flag\n"),
        "{ran:?}"
    );
    assert!(
        ran.out.contains("log-level = \"debug\" # flag\n"),
        "{ran:?}"
    );
}
