//! The audit log over HTTP: pages, and Server-Sent Events as a browser reads them.

use std::time::Duration;

use hallpass_client::v1::AuditFilter;
use http::Method;
use http_body_util::BodyExt;
use serde_json::Value;

use crate::{
    consumer::{changed, entries_where, filters},
    database::Database,
    names::id,
    server::{Server, config, head, run_sql, set_role, within},
    sql::run,
    web::Web,
};

/// What no event here should take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A filter as it stands behind the question mark.
fn query(filter: &AuditFilter) -> String {
    let change_type = filter.change_type().as_str_name();
    let change_type = change_type.trim_start_matches("CHANGE_TYPE_");
    [
        ("organization_id", &*filter.organization_id),
        ("affected_user_id", &filter.affected_user_id),
        ("actor_user_id", &filter.actor_user_id),
        ("permission", &filter.permission),
        ("table", &filter.table),
        ("change_type", change_type.trim_start_matches("UNSPECIFIED")),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(name, value)| format!("&{name}={value}"))
    .collect()
}

/// What tells an entry: its cursor and its id, and what it says of the row.
fn told(entry: &Value) -> String {
    let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
    let fields = [
        "cursor",
        "id",
        "organization_id",
        "permission",
        "affected_user_id",
        "table",
        "change_type",
    ];
    fields.map(text).join("|")
}

/// The same of what a query of the tables gives.
async fn expected(client: &tokio_postgres::Client, condition: &str) -> Vec<String> {
    let lines = entries_where(client, condition).await;
    let first_seven = |line: &String| line.split('|').take(7).collect::<Vec<_>>().join("|");
    lines.iter().map(first_seven).collect()
}

/// What a browser gets.
#[derive(Debug)]
struct SentEvent {
    name: String,
    id: String,
    data: Value,
}

/// A stream as a browser reads it.
struct Events {
    body: hyper::body::Incoming,
    text: String,
    /// How much of the text has been read.
    read: usize,
}

impl Events {
    async fn open(web: &Web, query: &str) -> Self {
        let path = format!("/v1/audit/stream?{query}");
        let answer = web.open(Method::GET, &path, None).await;
        assert_eq!(answer.status(), 200, "{path}");
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Self {
            body: answer.into_body(),
            text: String::new(),
            read: 0,
        }
    }

    /// The next event; `None` at the end.
    async fn next(&mut self) -> Option<SentEvent> {
        loop {
            while let Some((block, _)) = self.text[self.read..].split_once("\n\n") {
                self.read += block.len() + 2;
                let event = parsed(block);
                if event.is_some() {
                    return event;
                }
            }
            self.text.drain(..self.read);
            self.read = 0;
            let frame = within("an event", PATIENCE, self.body.frame()).await?;
            let bytes = frame.unwrap().into_data().unwrap();
            self.text += std::str::from_utf8(&bytes).unwrap();
        }
    }

    /// So many entries; checkpoints are passed over.
    async fn entries(&mut self, count: usize) -> Vec<SentEvent> {
        let mut entries = Vec::new();
        while entries.len() < count {
            let event = self.next().await.unwrap();
            match &*event.name {
                "entry" => entries.push(event),
                "checkpoint" => {}
                other => panic!("{other}: {}", event.data),
            }
        }
        entries
    }

    /// All that comes up to the end.
    async fn rest(&mut self) -> Vec<SentEvent> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// One event of a stream: as the HTML standard reads it, without what is not sent here.
fn parsed(block: &str) -> Option<SentEvent> {
    let field = |name: &str| {
        let mut lines = block.lines().filter_map(|line| line.split_once(": "));
        lines
            .find(|(field, _)| *field == name)
            .map(|(_, value)| value)
    };
    Some(SentEvent {
        name: field("event")?.to_owned(),
        id: field("id").unwrap_or_default().to_owned(),
        data: serde_json::from_str(field("data")?).unwrap(),
    })
}

#[tokio::test]
async fn pages_and_streams_are_the_log_for_every_filter() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    for (filter, condition) in filters() {
        let filter = query(&filter);
        let expected = expected(&client, &condition).await;
        let mut listed = Vec::new();
        let mut token = String::new();
        loop {
            let path = format!("/v1/audit?page_size=7&page_token={token}{filter}");
            let page = web.get(&path).await;
            assert_eq!(page.status, 200, "{path}: {page:?}");
            listed.extend(page.body["entries"].as_array().unwrap().iter().map(told));
            match page.body["next_page_token"].as_str() {
                Some(next) => next.clone_into(&mut token),
                None => break,
            }
        }
        listed.reverse();
        assert_eq!(listed, expected, "{filter}");
        let mut events = Events::open(&web, &format!("earliest=true{filter}")).await;
        let sent = events.entries(expected.len()).await;
        assert!(sent.iter().all(|event| event.data["cursor"] == event.id));
        let sent: Vec<String> = sent.iter().map(|event| told(&event.data)).collect();
        assert_eq!(sent, expected, "{filter}");
    }
}

#[tokio::test]
async fn an_entry_shows_the_row_as_json() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    set_role(&client, "lincoln", "cam", "volunteer").await;
    let page = Web::of(&server).get("/v1/audit?page_size=1").await;
    let entry = &page.body["entries"][0];
    assert_eq!(entry["before"]["role"], "committee_lead", "{entry}");
    assert_eq!(entry["after"]["role"], "volunteer", "{entry}");
    assert_eq!(
        entry["changed_fields"],
        serde_json::json!(["role"]),
        "{entry}"
    );
    assert_eq!(entry["actor_source"], "NONE", "{entry}");
    // What it does not have is left out.
    assert!(entry.get("actor_user_id").is_none(), "{entry}");
}

/// From every entry, in the middle of a statement's rows too, and wherever the query says to begin.
#[tokio::test]
async fn the_last_event_id_loses_and_repeats_nothing() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    let expected = expected(&client, "true").await;
    let all = Events::open(&web, "earliest=true")
        .await
        .entries(expected.len())
        .await;
    assert!(all.iter().any(|event| event.id.ends_with(".2")));
    for (index, last) in all.iter().enumerate() {
        let web = web.clone().with("last-event-id", &*last.id);
        let start = ["earliest=true", "now=true", "cursor=0-0", ""][index % 4];
        let mut again = Events::open(&web, start).await;
        let rest = again.entries(expected.len() - index - 1).await;
        let rest: Vec<String> = rest.iter().map(|event| told(&event.data)).collect();
        assert_eq!(rest, expected[index + 1..], "after {}", last.id);
    }
}

#[tokio::test]
async fn a_checkpoint_is_a_place_to_go_on_from() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    let mut idle = Events::open(&web, "now=true").await;
    let checkpoint = idle.next().await.unwrap();
    assert_eq!(checkpoint.name, "checkpoint");
    assert_eq!(checkpoint.data["cursor"], checkpoint.id);
    assert!(checkpoint.data["time"].as_str().unwrap().ends_with('Z'));
    set_role(&client, "lincoln", "cam", "admin").await;
    let web = web.with("last-event-id", checkpoint.id);
    let missed = Events::open(&web, "now=true").await.entries(1).await;
    let live = idle.entries(1).await;
    assert_eq!(missed[0].id, live[0].id);
    assert_eq!(missed[0].data["after"]["role"], "admin");
}

#[tokio::test]
async fn what_was_removed_is_a_gap_to_go_on_from() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    run_sql(&client, "UPDATE profiles SET role = 'admin'").await;
    let last = head(&client).await;
    let gone = format!(
        "DELETE FROM permission_audit_log WHERE entry_id = (SELECT entry_id FROM hallpass.log WHERE seq = {last})"
    );
    run(&client, &gone).await;
    let mut events = Events::open(&web, "earliest=true").await;
    let gap = loop {
        let event = events.next().await.unwrap();
        if event.name == "gap" {
            break event;
        }
    };
    assert_eq!(gap.data["to"], gap.id);
    assert!(gap.id.starts_with(&format!("{last}-")), "{gap:?}");
    set_role(&client, "lincoln", "cam", "volunteer").await;
    let web = web.with("last-event-id", gap.id);
    let after = Events::open(&web, "earliest=true").await.entries(1).await;
    assert_eq!(after[0].data["after"]["role"], "volunteer");
}

#[tokio::test]
async fn a_stream_that_cannot_begin_is_refused_with_a_status() {
    let (database, _client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    let cases = [
        ("", "400 INVALID_REQUEST"),
        ("now=true&earliest=true", "400 INVALID_REQUEST"),
        ("now=false", "400 INVALID_REQUEST"),
        ("cursor=nonsense", "400 INVALID_REQUEST"),
        ("since=yesterday", "400 INVALID_REQUEST"),
        ("now=true&change_type=REPLACE", "400 INVALID_REQUEST"),
        ("now=true&organization_id=7", "400 INVALID_REQUEST"),
        ("now=true&nonsense=1", "400 INVALID_REQUEST"),
        // Another database's: a browser would come back with it for ever.
        ("cursor=1-0000abcd", "410 CURSOR_UNKNOWN"),
    ];
    for (query, expected) in cases {
        let refused = web.get(&format!("/v1/audit/stream?{query}")).await;
        assert_eq!(refused.failed(), expected, "{query}: {refused:?}");
    }
    let lost = web.with("last-event-id", "1-0000abcd");
    let refused = lost.get("/v1/audit/stream?earliest=true").await;
    assert_eq!(refused.failed(), "410 CURSOR_UNKNOWN");
}

#[tokio::test]
async fn a_stream_says_why_it_ends_and_where_to_go_on() {
    let (database, client) = changed().await;
    let mut server = Server::start(config(&database.url)).await;
    let web = Web::of(&server);
    let count = expected(&client, "true").await.len();
    let mut events = Events::open(&web, "earliest=true").await;
    events.entries(count).await;
    server.begin_stop();
    let rest = events.rest().await;
    let end = rest.last().unwrap();
    assert_eq!(
        (&*end.name, &end.data["code"]),
        ("end", &"STREAM_ENDED".into())
    );
    assert_eq!(end.data["cursor"], end.id);
    assert!(end.data["error"].is_string());
    server.ended().await.unwrap();

    let next = Server::start(config(&database.url)).await;
    set_role(&client, "lincoln", "cam", "volunteer").await;
    let web = Web::of(&next).with("last-event-id", &*end.id);
    let after = Events::open(&web, "").await.entries(1).await;
    assert_eq!(after[0].data["after"]["role"], "volunteer");
}

#[tokio::test]
async fn a_slow_reader_is_ended_and_goes_on() {
    let database = Database::create().await;
    let client = database.client().await;
    crate::server::fill(&client).await;
    let mut config = config(&database.url);
    config.audit.slow_max = Duration::from_millis(300);
    let server = Server::start(config).await;
    let import = format!(
        "INSERT INTO profiles (org_id, user_id, role)
         SELECT '{}', md5(i::text)::uuid, 'volunteer' FROM generate_series(1, 40000) i",
        id("lincoln")
    );
    run(&client, &import).await;
    let expected = expected(&client, "true").await;
    let mut slow = Events::open(&Web::of(&server), "earliest=true").await;
    // Another gets what comes meanwhile; each checkpoint is half a second later.
    let mut quick = Events::open(&Web::of(&server), "now=true").await;
    for role in ["volunteer", "admin", "volunteer"] {
        set_role(&client, "lincoln", "ann", role).await;
        quick.entries(1).await;
    }
    for _ in 0..5 {
        while quick.next().await.unwrap().name != "checkpoint" {}
    }
    let mut taken = slow.rest().await;
    let end = taken.pop().unwrap();
    assert_eq!(
        (&*end.name, &end.data["code"]),
        ("end", &"SLOW_CONSUMER".into())
    );
    let taken = taken.iter().filter(|event| event.name == "entry").count();
    assert!(taken < expected.len());
    let web = Web::of(&server).with("last-event-id", end.id);
    let mut again = Events::open(&web, "").await;
    let rest = again.entries(expected.len() - taken).await;
    assert_eq!(told(&rest.last().unwrap().data), *expected.last().unwrap());
}
