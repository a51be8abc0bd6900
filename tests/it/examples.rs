//! The examples as their users run them, against a real service: `make examples` installs what they import.

use std::{fs, path::Path, process::Stdio, time::Duration};

use hallpass::auth::api_key::Pepper;
use hallpass_client::v1::ListUserPermissionsRequest;
use http::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStdout, Command},
};
use tokio_postgres::Client;

use crate::{
    commands::{command, finish},
    consumer::{changed, entries_where},
    database::{Database, eventually},
    keyring::{Made, TIMING, client_with, config_with_keys},
    names::id,
    server::{APPROVE, Server, config, fill, run_sql, set_role, within},
    sql::value,
    support::temporary_directory,
    web::Web,
};

/// What no line of an example should take.
const PATIENCE: Duration = Duration::from_secs(60);

/// An example that is a program of commands.
#[derive(Clone, Copy, Debug)]
enum Language {
    Node,
    Python,
}

/// A path in the repository; what `make examples` puts there must be there.
fn installed(path: &str) -> String {
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    assert!(
        Path::new(&path).exists(),
        "{path} is missing: run `make examples`"
    );
    path
}

fn node(directory: &str, program: &str) -> Command {
    installed(&format!(
        "examples/{directory}/node_modules/.package-lock.json"
    ));
    let mut node = command("node");
    node.arg(installed(&format!("examples/{directory}/{program}")));
    node
}

/// An example, told where to ask.
fn example(language: Language, endpoint: &str) -> Command {
    let mut example = match language {
        Language::Node => node("node", "client.js"),
        Language::Python => {
            let stubs = installed("target/python/installed").replace("/installed", "");
            let mut python = command(&installed("target/python/bin/python"));
            python.env("PYTHONPATH", stubs).arg("-B");
            python.arg(installed("examples/python/client.py"));
            python
        }
    };
    example.env("HALLPASS_ENDPOINT", endpoint);
    example
}

/// A program that prints lines; killed as it is dropped.
struct Printing {
    child: Child,
    out: Lines<BufReader<ChildStdout>>,
}

impl Printing {
    fn start(mut program: Command) -> Self {
        let mut child = program.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, out }
    }

    async fn line(&mut self) -> String {
        let line = within("a line", PATIENCE, self.out.next_line()).await;
        line.unwrap().expect("a line")
    }

    /// The lines that it has printed whole and that were not read.
    async fn kill(mut self) -> Vec<String> {
        self.child.kill().await.unwrap();
        let mut rest = String::new();
        let mut out = self.out.into_inner();
        out.read_to_string(&mut rest).await.unwrap();
        let whole = rest.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(str::to_owned).collect()
    }
}

/// The application of examples/express, which waits so long for hallpass.
struct Application {
    _running: Printing,
    web: Web,
}

impl Application {
    async fn start(endpoint: &str, token: &str, deadline: Duration) -> Self {
        let mut program = node("express", "app.js");
        program
            .env("PORT", "0")
            .env("HALLPASS_ENDPOINT", endpoint)
            .env("HALLPASS_TOKEN", token)
            .env("HALLPASS_DEADLINE_MS", deadline.as_millis().to_string());
        // Why it cannot answer is expected, and said many times.
        program.stderr(Stdio::null());
        let mut running = Printing::start(program);
        let address = running.line().await;
        let address = address.strip_prefix("http://").unwrap();
        let web = Web::at(address.parse().unwrap());
        Self {
            _running: running,
            web,
        }
    }

    /// `200 {"done":…}` to a request of a user of lincoln.
    async fn ask(&self, user: &str, route: &str) -> (u16, Value) {
        let of = |name: &str| id(name).to_string();
        let web = (self.web.clone())
            .with("x-user-id", of(user))
            .with("x-org-id", of("lincoln"));
        send(&web, route).await
    }
}

/// A route is `POST /path`.
async fn send(web: &Web, route: &str) -> (u16, Value) {
    let (method, path) = route.split_once(' ').unwrap();
    let method: Method = method.parse().unwrap();
    let answer = web.send(method, path, None).await;
    (answer.status.as_u16(), answer.body)
}

/// What PTO Connect's middleware says to who may not.
fn denied(permission: &str) -> Value {
    json!({
        "error": "Insufficient permissions",
        "permission": permission,
        "message": "Your role does not have permission to perform this action. Contact your organization administrator.",
    })
}

fn denied_several(permissions: [&str; 2], operator: &str) -> Value {
    json!({
        "error": "Insufficient permissions",
        "permissions": permissions,
        "operator": operator,
        "message": "Your role does not have the required permissions to perform this action.",
    })
}

fn unavailable() -> (u16, Value) {
    (503, json!({"error": "Permission check failed"}))
}

const APPROVE_EXPENSES: &str = "POST /expenses/approve";
const CLOSE_BUDGET: &str = "POST /budget/close";
const INBOX: &str = "GET /inbox";
const ROUTES: [&str; 4] = ["GET /budget", APPROVE_EXPENSES, CLOSE_BUDGET, INBOX];

#[tokio::test]
async fn the_express_middleware_answers_as_pto_connect_s() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let key = Made {
        scopes: vec!["check"],
        ..Made::default()
    };
    let key = key.make(&database.url).await;
    let server = Server::start(config_with_keys(&database.url, TIMING, Pepper::default())).await;
    let application = Application::start(&server.endpoint, &key, PATIENCE).await;

    let close = denied_several(["can_edit_budget_items", APPROVE], "AND");
    let inbox = denied_several(["can_view_messages", APPROVE], "OR");
    // (user, route) -> the body of a 403, or none
    let cases = [
        ("vic", "GET /budget", None),
        ("pat", "GET /budget", Some(denied("can_view_budget"))),
        ("bob", APPROVE_EXPENSES, None),
        ("vic", APPROVE_EXPENSES, Some(denied(APPROVE))),
        ("stranger", APPROVE_EXPENSES, Some(denied(APPROVE))),
        // Both, the first alone, neither.
        ("bob", CLOSE_BUDGET, None),
        ("cam", CLOSE_BUDGET, Some(close.clone())),
        ("vic", CLOSE_BUDGET, Some(close)),
        ("bob", INBOX, None),
        ("vic", INBOX, None),
        ("pat", INBOX, Some(inbox.clone())),
    ];
    for (user, route, denied) in cases {
        let (_, path) = route.split_once(' ').unwrap();
        let done = json!({"done": route});
        let expected = denied.map_or((200, done), |body| (403, body));
        assert_eq!(
            application.ask(user, route).await,
            expected,
            "{user} {path}"
        );
    }

    // Without a user, or without an organization.
    let half = |name| application.web.clone().with(name, id("bob").to_string());
    for web in [application.web.clone(), half("x-user-id"), half("x-org-id")] {
        for route in ROUTES {
            let unauthenticated = (401, json!({"error": "Authentication required"}));
            assert_eq!(send(&web, route).await, unauthenticated, "{route}");
        }
    }

    let until = async |user, route, status| {
        eventually(&format!("{user} gets {status} for {route}"), async || {
            application.ask(user, route).await.0 == status
        })
        .await;
    };
    run_sql(
        &client,
        "INSERT INTO organization_permissions (org_id, permission_key, specific_users)
         VALUES (:lincoln, 'can_approve_expenses', ARRAY[:pat, :cam])",
    )
    .await;
    until("pat", APPROVE_EXPENSES, 200).await;
    // The second of them alone is enough for one, and the missing one for the other.
    until("pat", INBOX, 200).await;
    until("cam", CLOSE_BUDGET, 200).await;
    run_sql(&client, "DELETE FROM organization_permissions").await;
    until("pat", APPROVE_EXPENSES, 403).await;
    until("pat", INBOX, 403).await;

    server.stop().await;
    for route in ROUTES {
        // An admin's, whom hallpass allowed everything.
        assert_eq!(
            application.ask("ann", route).await,
            unavailable(),
            "{route}"
        );
    }
}

/// Whom it cannot ask about, whom it may not ask about, and where it is not answered.
#[tokio::test]
async fn the_express_middleware_lets_nobody_pass_on_an_error() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let (url, franklin) = (&database.url, Some(vec![id("franklin")]));
    let list_alone = Made {
        scopes: vec!["list"],
        ..Made::default()
    };
    let elsewhere = Made {
        organizations: franklin,
        ..Made::default()
    };
    let keys = [
        "hp_none",
        &list_alone.make(url).await,
        // In a batch it is the items that have the error.
        &elsewhere.make(url).await,
    ];
    let server = Server::start(config_with_keys(url, TIMING, Pepper::default())).await;
    // Takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let deadline = Duration::from_millis(200);
    let mut applications = vec![Application::start(&silent, "", deadline).await];
    for key in keys {
        applications.push(Application::start(&server.endpoint, key, PATIENCE).await);
    }
    for application in applications {
        for route in ROUTES {
            let answer = within(
                "an answer by the deadline",
                PATIENCE,
                application.ask("ann", route),
            );
            assert_eq!(answer.await, unavailable(), "{route}");
        }
    }
    server.stop().await;
}

async fn a_client_checks_and_lists(language: Language) {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let key = Made::default().make(&database.url).await;
    let server = Server::start(config_with_keys(&database.url, TIMING, Pepper::default())).await;
    let ask = async |arguments: &[&str], token: &str| {
        let mut example = example(language, &server.endpoint);
        example.args(arguments).env("HALLPASS_TOKEN", token);
        finish(example).await
    };
    let of = |name: &str| id(name).to_string();
    let (lincoln, bob, cam, vic) = (of("lincoln"), of("bob"), of("cam"), of("vic"));
    let cases: [(&str, &str, i32, &str); 4] = [
        (&bob, APPROVE, 0, "allow REASON_GRANTED_BY_ROLE\n"),
        (&vic, APPROVE, 1, "deny REASON_ROLE_TOO_LOW\n"),
        (&vic, "no_such", 1, "deny REASON_UNKNOWN_PERMISSION\n"),
        ("no id", APPROVE, 2, ""),
    ];
    for (user, permission, code, out) in cases {
        let ran = ask(&["check", &lincoln, user, permission], &key).await;
        assert_eq!((ran.code, &*ran.out), (code, out), "{ran:?}");
    }
    for (arguments, token) in [
        (&["check", &lincoln, &bob, APPROVE][..], "hp_none"),
        (&["list", &lincoln, &bob], "hp_none"),
        (&["check", &lincoln], &key),
        (&["toString"], &key),
        (&[], &key),
    ] {
        let ran = ask(arguments, token).await;
        assert_eq!((ran.code, &*ran.out), (2, ""), "{ran:?}");
    }
    let request = ListUserPermissionsRequest {
        organization_id: lincoln.clone(),
        user_id: cam.clone(),
        ..ListUserPermissionsRequest::default()
    };
    let mut lister = client_with(&server, &key);
    let listed = lister.list_user_permissions(request).await.unwrap();
    let expected: Vec<String> = (listed.into_inner().permissions.iter())
        .map(|permission| {
            let verdict = if permission.allowed { "allow" } else { "deny" };
            let reason = permission.reason().as_str_name();
            format!("{verdict} {reason} {}", permission.permission)
        })
        .collect();
    assert_eq!(expected.len(), 30);
    let ran = ask(&["list", &lincoln, &cam], &key).await;
    let out: Vec<&str> = ran.out.lines().collect();
    assert_eq!(
        (ran.code, out),
        (0, expected.iter().map(|line| &**line).collect())
    );
    server.stop().await;
}

#[tokio::test]
async fn the_node_client_checks_and_lists() {
    a_client_checks_and_lists(Language::Node).await;
}

#[tokio::test]
async fn the_python_client_checks_and_lists() {
    a_client_checks_and_lists(Language::Python).await;
}

/// The cursors of what is in the log.
async fn logged(client: &Client) -> Vec<String> {
    let entries = entries_where(client, "true").await;
    (entries.iter())
        .map(|line| line.split('|').next().unwrap().to_owned())
        .collect()
}

async fn a_follower_that_is_killed_goes_on_where_it_was(language: Language) {
    let (database, client) = changed().await;
    let mut config = config(&database.url);
    // Streams end all the time.
    config.audit.age_max = Some(Duration::from_millis(300));
    let server = Server::start(config).await;
    let directory = temporary_directory();
    let file = directory.path().join("cursor");
    let follow = || {
        let mut follow = example(language, &server.endpoint);
        follow.arg("follow").arg(&file);
        Printing::start(follow)
    };
    let cursor = |line: String| line.split(' ').next().unwrap().to_owned();
    let promote = async |round: usize| {
        set_role(&client, "lincoln", "ann", ["admin", "volunteer"][round % 2]).await;
    };

    let mut printed = Vec::new();
    for round in 0..3 {
        let mut follower = follow();
        for change in 0..=round {
            promote(change).await;
            let all = logged(&client).await;
            while printed.len() < all.len() {
                printed.push(cursor(follower.line().await));
            }
        }
        let head = value(&client, "SELECT hallpass.head()").await;
        eventually("the cursor is kept", async || {
            let kept = fs::read_to_string(&file).unwrap_or_default();
            kept.split('.').next() == Some(&head)
        })
        .await;
        assert!(follower.kill().await.is_empty());
        // While nobody follows.
        promote(round + 1).await;
    }
    let mut follower = follow();
    printed.push(cursor(follower.line().await));
    assert!(follower.kill().await.is_empty());
    // From a cursor that was kept nothing came twice.
    assert_eq!(printed, logged(&client).await);

    // Killed anywhere, what was not kept comes again, and nothing is missing.
    for round in 0..200 {
        promote(round).await;
    }
    let all = logged(&client).await;
    while printed.last() != all.last() {
        let mut follower = follow();
        let mut cursors = vec![cursor(follower.line().await)];
        cursors.extend(follower.kill().await.into_iter().map(cursor));
        cursors.retain(|cursor| !printed.contains(cursor));
        printed.extend(cursors);
    }
    assert_eq!(printed, all);
    server.stop().await;
}

#[tokio::test]
async fn the_node_follower_that_is_killed_goes_on_where_it_was() {
    a_follower_that_is_killed_goes_on_where_it_was(Language::Node).await;
}

#[tokio::test]
async fn the_python_follower_that_is_killed_goes_on_where_it_was() {
    a_follower_that_is_killed_goes_on_where_it_was(Language::Python).await;
}
