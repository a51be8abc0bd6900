//! The hallpass program as its users run it: what it prints, and what it exits with.

use std::{
    env, fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use hallpass_client::v1::{
    CheckPermissionRequest, Source, permission_service_client::PermissionServiceClient,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
    task::JoinSet,
};
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::{
    database::{Database, as_role, eventually},
    names::id,
    proxy::{Proxy, Way},
    server::{APPROVE, Server, config, fill, within},
    support::{self, HALLPASS, temporary_directory},
};

/// What no command here should take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const ALLOW: i32 = 0;
const DENY: i32 = 1;
const ERROR: i32 = 2;

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// What was printed to standard error besides the log's lines.
    pub(crate) fn complaint(&self) -> Vec<&str> {
        let is_logged = |line: &str| {
            [" INFO ", " WARN ", " ERROR "]
                .iter()
                .any(|l| line.contains(l))
        };
        self.err.lines().filter(|line| !is_logged(line)).collect()
    }

    /// Asserts an error that says what is the matter on one line.
    pub(crate) fn assert_one_line(&self, expected: &str) {
        assert_eq!(self.code, ERROR, "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
        let complaint = self.complaint();
        assert_eq!(complaint.len(), 1, "{self:?}");
        assert!(complaint[0].starts_with("hallpass: "), "{self:?}");
        assert!(complaint[0].contains(expected), "{expected}: {self:?}");
    }
}

/// Nothing of whoever runs the tests reaches the program.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        let ours = name.to_string_lossy().starts_with("HALLPASS_");
        if ours || name == "RUST_LOG" || name == "PGPORT" {
            command.env_remove(name);
        }
    }
    // Several run at once, and its usual port is one.
    command.env("HALLPASS_HTTP_LISTEN", "none");
    command.env("HALLPASS_OPS_LISTEN", "none");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

pub(crate) async fn finish(mut command: Command) -> Ran {
    let output = within("the command ends", PATIENCE, command.output()).await;
    let output = output.unwrap();
    Ran {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) async fn hallpass(arguments: &[&str]) -> Ran {
    let mut command = command(HALLPASS);
    command.args(arguments);
    finish(command).await
}

/// A `hallpass serve` or `hallpass demo` of its own process, listening at a socket.
struct Running {
    child: Child,
    socket: PathBuf,
    out: PathBuf,
    _directory: TempDir,
}

impl Running {
    /// Starts it; `data` in the arguments stands for an empty directory, `socket` for where it is to listen.
    fn start(arguments: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        let directory = temporary_directory();
        let socket = directory.path().join("socket");
        let out = directory.path().join("out");
        prepare(&socket);
        let data = directory.path().join("data");
        let mut command = command(HALLPASS);
        command
            .args(arguments)
            .env("HALLPASS_DATA_DIR", &data)
            .env("HALLPASS_GRPC_LISTEN", format!("unix:{}", socket.display()))
            .env("HALLPASS_LAME_DUCK", "10ms")
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(directory.path().join("err")).unwrap());
        Self {
            child: command.spawn().unwrap(),
            socket,
            out,
            _directory: directory,
        }
    }

    fn endpoint(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    async fn ended(mut self) -> ExitStatus {
        within("the service ends", PATIENCE, self.child.wait())
            .await
            .unwrap()
    }

    /// Asks until there is an answer.
    async fn until_answering(&mut self) {
        eventually("it answers", async || {
            assert_eq!(self.child.try_wait().unwrap(), None);
            let arguments = arguments(&self.endpoint(), "check", "vic", &[APPROVE]);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            hallpass(&arguments).await.code == DENY
        })
        .await;
    }
}

/// `check` or `list` about a user of lincoln.
fn arguments(endpoint: &str, command: &str, user: &str, rest: &[&str]) -> Vec<String> {
    let (organization, user) = (id("lincoln").to_string(), id(user).to_string());
    [command, "--endpoint", endpoint, &organization, &user]
        .iter()
        .chain(rest)
        .map(ToString::to_string)
        .collect()
}

async fn run(arguments: &[String]) -> Ran {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    hallpass(&arguments).await
}

#[tokio::test]
async fn check_exits_with_its_answer() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let cases: [(&str, &[&str], i32, &[&str]); 6] = [
        (
            "bob",
            &[APPROVE],
            ALLOW,
            &["allow  GRANTED_BY_ROLE\n", "from the cache at position 12-"],
        ),
        (
            "vic",
            &[APPROVE],
            DENY,
            &["deny   ROLE_TOO_LOW\n", "ms stale at most\n"],
        ),
        ("stranger", &[APPROVE], DENY, &["deny   NOT_A_MEMBER\n"]),
        ("bob", &["no_such"], DENY, &["deny   UNKNOWN_PERMISSION\n"]),
        (
            "bob",
            &[APPROVE, "--fully-consistent"],
            ALLOW,
            &["from the database at position 12-"],
        ),
        (
            "vic",
            &[APPROVE, "--explain"],
            DENY,
            &[
                "deny   ROLE_TOO_LOW\n",
                "  role           volunteer (rank 1)\n",
                "  minimum role   board_member (the template's)\n",
                "  enabled        yes\n",
                "from the database at position 12-",
            ],
        ),
    ];
    for (user, rest, code, expected) in cases {
        let ran = run(&arguments(&server.endpoint, "check", user, rest)).await;
        assert_eq!((ran.code, &*ran.err), (code, ""), "{ran:?}");
        for part in expected {
            assert!(ran.out.contains(part), "{part}: {ran:?}");
        }
    }
    let mut by_environment = command(HALLPASS);
    by_environment
        .args([
            "check",
            &id("lincoln").to_string(),
            &id("bob").to_string(),
            APPROVE,
        ])
        .env("HALLPASS_ENDPOINT", &server.endpoint);
    assert_eq!(finish(by_environment).await.code, ALLOW);
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_answer_is_an_error_on_one_line() {
    let database = Database::create().await;
    let proxy = Proxy::to(&database.url, Way::Closed);
    let server = Server::listening(config(&proxy.url)).await;
    let (lincoln, bob) = (id("lincoln").to_string(), id("bob").to_string());
    let endpoint = &*server.endpoint;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let cases: [(&[&str], &str); 6] = [
        (
            &["--endpoint", endpoint, &lincoln, "b\u{1b}[31mob", APPROVE],
            "INVALID_ARGUMENT: user_id: must be",
        ),
        (
            &["--endpoint", endpoint, &lincoln, &bob, ""],
            "INVALID_ARGUMENT: permission: must be",
        ),
        (
            &["--endpoint", endpoint, &lincoln, &bob, APPROVE],
            "UNAVAILABLE: the database cannot be asked",
        ),
        (
            &["--endpoint", &nobody, &lincoln, &bob, APPROVE],
            "nobody answers at http",
        ),
        (
            &[
                "--endpoint",
                "unix:/no/such/socket",
                &lincoln,
                &bob,
                APPROVE,
            ],
            "nobody answers at unix:",
        ),
        (
            &["--endpoint", "no endpoint", &lincoln, &bob, APPROVE],
            "no endpoint",
        ),
    ];
    for (arguments, expected) in cases {
        let ran = hallpass(&[&["check"], arguments].concat()).await;
        ran.assert_one_line(expected);
        assert!(!ran.err.trim_end().contains(char::is_control), "{ran:?}");
    }
    for usage in [
        &["check"][..],
        &["list", &lincoln],
        &["no-such-command"],
        &[],
    ] {
        let ran = hallpass(usage).await;
        assert_eq!((ran.code, &*ran.out), (ERROR, ""), "{ran:?}");
        assert!(ran.err.contains("Usage"), "{ran:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn list_prints_a_table() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    // (user, options) -> the first line, and how many lines say allow and deny
    let cases: [(&str, &[&str], &str, usize, usize); 5] = [
        ("cam", &[], "role committee_lead", 20, 10),
        ("cam", &["--allowed-only"], "role committee_lead", 20, 0),
        ("cam", &["--module", "budget"], "role committee_lead", 3, 2),
        ("cam", &["--module", "no such"], "role committee_lead", 0, 0),
        ("stranger", &["--module", "budget"], "no member", 0, 5),
    ];
    for (user, options, first, allowed, denied) in cases {
        let ran = run(&arguments(&server.endpoint, "list", user, options)).await;
        assert_eq!((ran.code, &*ran.err), (0, ""), "{ran:?}");
        assert!(ran.out.starts_with(first), "{ran:?}");
        let count = |start| {
            ran.out
                .lines()
                .filter(|line| line.starts_with(start))
                .count()
        };
        assert_eq!(
            (count("  allow"), count("  deny")),
            (allowed, denied),
            "{ran:?}"
        );
        assert!(ran.out.trim_end().ends_with("ms stale at most"), "{ran:?}");
    }
    let line =
        "  allow  can_create_budget_items  GRANTED_BY_ROLE      minimum role committee_lead\n";
    let ran = run(&arguments(
        &server.endpoint,
        "list",
        "cam",
        &["--module", "budget"],
    ))
    .await;
    assert!(ran.out.contains(line), "{ran:?}");
    let ran = hallpass(&["list", "--endpoint", &server.endpoint, "x", "y"]).await;
    ran.assert_one_line("INVALID_ARGUMENT: organization_id: must be");
    server.stop().await;
}

/// The cluster's own database.
async fn admin() -> Client {
    connect(&support::cluster().url_for("postgres")).await
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn migrate_says_what_it_does_and_does_it_once() {
    let create = "CREATE DATABASE migrated_by_command";
    admin().await.batch_execute(create).await.unwrap();
    let url = support::cluster().url_for("migrated_by_command");
    let migrate = ["migrate", "--database-url", &url];
    let check = [&migrate[..], &["--check"]].concat();

    let ran = hallpass(&check).await;
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.out
            .starts_with("the schema is behind; to apply: 0001_tables, "),
        "{ran:?}"
    );
    let ran = hallpass(&migrate).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let (applied, last) = ran.out.trim_end().rsplit_once('\n').unwrap();
    let (applied, building): (Vec<&str>, Vec<&str>) =
        (applied.lines()).partition(|line| line.starts_with("applied 00"));
    let is_building = |line: &&str| line.starts_with("CREATE INDEX CONCURRENTLY ");
    assert!(building.iter().all(is_building), "{ran:?}");
    let count = applied.len();
    assert_eq!(
        last,
        format!("the schema is current: {count} migrations applied")
    );
    let ran = hallpass(&check).await;
    assert_eq!(
        (ran.code, &*ran.out),
        (0, "the schema is current\n"),
        "{ran:?}"
    );
    let ran = hallpass(&migrate).await;
    let nothing = "the schema is current: 0 migrations applied\n";
    assert_eq!((ran.code, &*ran.out), (0, nothing), "{ran:?}");

    let client = connect(&url).await;
    let newer = "INSERT INTO hallpass.schema_migrations (version, name, checksum) VALUES (1000, 'later', '')";
    client.batch_execute(newer).await.unwrap();
    let ran = hallpass(&check).await;
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.out.contains("version 1000, newer"), "{ran:?}");
    hallpass(&migrate)
        .await
        .assert_one_line("version 1000, newer");
    let changed = "UPDATE hallpass.schema_migrations SET checksum = 'x' WHERE version = 1";
    client.batch_execute(changed).await.unwrap();
    let ran = hallpass(&check).await;
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.out.contains("0001_tables"), "{ran:?}");
    hallpass(&migrate).await.assert_one_line("0001_tables");
}

/// A role that needs a password, in a cluster where nobody else does.
async fn create_role_with_password() {
    let admin = admin().await;
    let create = "CREATE ROLE scram LOGIN PASSWORD 'right'";
    admin.batch_execute(create).await.unwrap();
    let row = admin.query_one("SHOW hba_file", &[]).await.unwrap();
    let file: String = row.get(0);
    let rules = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("local all scram scram-sha-256\n{rules}")).unwrap();
    admin
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    let url = support::cluster()
        .url_for("postgres")
        .replace("user=hallpass", "user=scram");
    // The reload is a signal: it takes a moment.
    eventually("the role needs its password", async || {
        tokio_postgres::connect(&url, NoTls).await.is_err()
    })
    .await;
}

#[tokio::test]
async fn serve_and_migrate_say_why_they_will_not_on_one_line() {
    create_role_with_password().await;
    let database = Database::create().await;
    let url = |user: &str| database.url.replace("user=hallpass", user);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    let [none, no_role, no_password, wrong_password] = [
        support::cluster().url_for("no_such_database"),
        url("user=no_such_role"),
        url("user=scram"),
        url("user=scram&password=wrong"),
    ];
    let databases = [
        (&none, "does not exist"),
        (&no_role, "does not exist"),
        (&no_password, "password"),
        (&wrong_password, "password authentication failed"),
    ];
    for (url, expected) in databases {
        let serve = [
            "serve",
            "--grpc-listen",
            "127.0.0.1:0",
            "--database-url",
            url,
        ];
        hallpass(&serve).await.assert_one_line(expected);
        hallpass(&["migrate", "--database-url", url])
            .await
            .assert_one_line(expected);
    }
    let settings = [
        (
            "--staleness-ceiling=1s",
            "must not be less than --staleness-bound (2s)",
        ),
        ("--feed-database-url=nonsense", "--feed-database-url: "),
    ];
    for (setting, expected) in settings {
        let serve = ["serve", "--database-url", &database.url, setting];
        hallpass(&serve).await.assert_one_line(expected);
    }
    let addresses = [
        (&*taken, "cannot listen on 127.0.0.1:"),
        ("0.0.0.0:0", "say who may call"),
        ("[::]:0", "say who may call"),
        ("unix:/no/such/directory/socket", "cannot listen on unix:"),
    ];
    for (address, expected) in addresses {
        let serve = [
            "serve",
            "--grpc-listen",
            address,
            "--database-url",
            &database.url,
        ];
        hallpass(&serve).await.assert_one_line(expected);
    }
}

#[tokio::test]
async fn serve_listens_at_a_socket_and_ends_when_told() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let url = as_role(&database.url, "hallpass_service");
    for signal in [Signal::TERM, Signal::INT] {
        // A service that was killed left this behind.
        let dead = |socket: &Path| drop(UnixListener::bind(socket).unwrap());
        let mut running = Running::start(&["serve", "--database-url", &url], dead);
        running.until_answering().await;
        let socket = running.socket.clone();

        let second = [
            "serve",
            "--database-url",
            &url,
            "--grpc-listen",
            &running.endpoint(),
        ];
        hallpass(&second)
            .await
            .assert_one_line("cannot listen on unix:");
        running.until_answering().await;

        running.signal(signal);
        assert_eq!(running.ended().await.code(), Some(0));
        assert!(!socket.exists());
    }
}

#[tokio::test]
async fn serve_takes_no_file_for_its_socket_and_stops_while_it_waits() {
    let database = Database::create().await;
    let directory = temporary_directory();
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let listen = format!("unix:{}", file.display());
    let serve = [
        "serve",
        "--grpc-listen",
        &listen,
        "--database-url",
        &database.url,
    ];
    hallpass(&serve)
        .await
        .assert_one_line("cannot listen on unix:");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");

    let away = Proxy::to(&database.url, Way::Closed);
    let running = Running::start(&["serve", "--database-url", &away.url], |_| ());
    eventually("it listens", async || running.socket.exists()).await;
    running.signal(Signal::TERM);
    assert_eq!(running.ended().await.code(), Some(0));
}

/// Checks among all of the demo's members and permissions.
const DEMO_CHECKS: usize = 10_000;

/// How many of them at once.
const DEMO_CALLERS: usize = 32;

const DEMO_MEMBERS: &str = "SELECT org_id, user_id FROM public.profiles ORDER BY org_id, user_id";
const DEMO_KEYS: &str = "
SELECT permission_key::text FROM public.organization_permission_templates ORDER BY permission_key";
const DEMO_TRUTH: &str = "
SELECT user_has_permission_in_org(org_id, user_id, key)
FROM unnest($1::uuid[], $2::uuid[], $3::text[]) WITH ORDINALITY asked (org_id, user_id, key, n) ORDER BY n";

#[tokio::test]
async fn the_demo_s_commands_do_what_it_says_and_its_answers_come_from_the_cache() {
    let demo = Running::start(&["demo", "--grpc-listen", "127.0.0.1:0"], |_| ());
    let printed = async || fs::read_to_string(&demo.out).unwrap();
    within("the demo is ready", PATIENCE, async {
        while !printed().await.contains("Ctrl-C stops it") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let guide = printed().await;
    let is_command = |line: &&str| line.starts_with(HALLPASS) || line.starts_with("psql ");
    let commands: Vec<&str> = guide.lines().filter(is_command).collect();
    let [allow, deny, promote, allow_then, tail] = commands[..] else {
        panic!("{guide}");
    };
    let sh = async |line: &str| {
        let mut shell = command("sh");
        shell.args(["-c", line]);
        finish(shell).await
    };
    let ran = sh(allow).await;
    assert_eq!(ran.code, ALLOW, "{ran:?}");
    assert!(
        ran.out
            .starts_with("allow  GRANTED_BY_ROLE\nfrom the cache"),
        "{ran:?}"
    );
    let ran = sh(deny).await;
    assert_eq!(ran.code, DENY, "{ran:?}");
    assert!(ran.out.starts_with("deny   ROLE_TOO_LOW\n"), "{ran:?}");
    assert!(ran.out.contains("from the cache"), "{ran:?}");
    let ran = sh(promote).await;
    assert_eq!((ran.code, &*ran.out), (0, "UPDATE 1\n"), "{ran:?}");
    // The change needs a moment, less than it takes to paste the command.
    eventually("the promotion is seen", async || {
        sh(allow_then).await.code == ALLOW
    })
    .await;

    let mut follower = command("sh");
    follower.args(["-c", &format!("exec {tail}")]);
    let mut follower = follower.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let promoted =
        "role volunteer -> board_member  by an actor that was not named, login hallpass, in psql";
    within("the promotion is told of", PATIENCE, async {
        while !lines.next_line().await.unwrap().unwrap().contains(promoted) {}
    })
    .await;

    let url = promote.split('\'').nth(1).unwrap();
    let client = connect(url).await;
    let endpoint = guide.lines().find_map(|line| line.strip_prefix("gRPC at "));
    assert_random_checks(endpoint.unwrap(), &client).await;
    demo.signal(Signal::INT);
    assert_eq!(demo.ended().await.code(), Some(0));
}

async fn assert_random_checks(endpoint: &str, database: &Client) {
    let members = database.query(DEMO_MEMBERS, &[]).await.unwrap();
    let keys = database.query(DEMO_KEYS, &[]).await.unwrap();
    assert_eq!((members.len(), keys.len()), (10_000, 30));
    let mut random = StdRng::seed_from_u64(1);
    let questions: Vec<(Uuid, Uuid, String)> = (0..DEMO_CHECKS)
        .map(|_| {
            let member = &members[random.random_range(0..members.len())];
            let key = &keys[random.random_range(0..keys.len())];
            (member.get(0), member.get(1), key.get(0))
        })
        .collect();
    let channel = hallpass_client::connect(endpoint).await.unwrap();
    let mut callers = JoinSet::new();
    for (first, share) in questions
        .chunks(DEMO_CHECKS.div_ceil(DEMO_CALLERS))
        .enumerate()
    {
        let (share, mut client) = (
            share.to_vec(),
            PermissionServiceClient::new(channel.clone()),
        );
        callers.spawn(async move {
            let mut answers = Vec::with_capacity(share.len());
            for (organization, user, permission) in share {
                let request = CheckPermissionRequest {
                    organization_id: organization.to_string(),
                    user_id: user.to_string(),
                    permission,
                    ..CheckPermissionRequest::default()
                };
                let answer = client.check_permission(request).await.unwrap().into_inner();
                let is_cached = answer.evidence.unwrap().source() == Source::Cache;
                answers.push((answer.allowed, is_cached));
            }
            (first, answers)
        });
    }
    let mut shares = callers.join_all().await;
    shares.sort_unstable_by_key(|(first, _)| *first);
    let answers: Vec<(bool, bool)> = shares.into_iter().flat_map(|(_, share)| share).collect();

    let organizations: Vec<Uuid> = questions.iter().map(|q| q.0).collect();
    let users: Vec<Uuid> = questions.iter().map(|q| q.1).collect();
    let permissions: Vec<&str> = questions.iter().map(|q| &*q.2).collect();
    let truth = database
        .query(DEMO_TRUTH, &[&organizations, &users, &permissions])
        .await
        .unwrap();
    assert_eq!(truth.len(), answers.len());
    for ((row, answer), question) in truth.iter().zip(&answers).zip(&questions) {
        assert_eq!(row.get::<_, bool>(0), answer.0, "{question:?}");
    }
    let cached = answers.iter().filter(|(_, is_cached)| *is_cached).count();
    assert!(
        cached >= DEMO_CHECKS * 95 / 100,
        "{cached} of {DEMO_CHECKS}"
    );
}
