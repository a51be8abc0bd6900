//! How streams of audit entries end: each with the cursor from which another goes on, nothing lost and nothing twice.

use std::time::Duration;

use hallpass_client::{
    tonic::Code,
    v1::{AuditFilter, stream_audit_entries_request::Start},
};

use crate::{
    consumer::{Consumer, changed, cursor, entries_where, read, serve},
    database::eventually,
    names::id,
    server::{Server, config, head, set_role, within},
    sql::{run, value},
};

/// A slow consumer is ended with its cursor, and nobody else waits for it.
#[tokio::test]
async fn a_slow_consumer_slows_itself_alone() {
    let (database, client) = changed().await;
    let mut config = config(&database.url);
    config.audit.slow_max = Duration::from_millis(300);
    let server = Server::start(config).await;
    let import = format!(
        "INSERT INTO profiles (org_id, user_id, role)
         SELECT '{}', md5(i::text)::uuid, 'volunteer' FROM generate_series(1, 40000) i",
        id("lincoln")
    );
    run(&client, &import).await;
    // A connection of its own: on a shared one what it does not take would be in the others' way.
    let channel = hallpass_client::connect(&server.endpoint).await.unwrap();
    let mut slow = Consumer::start(&channel, Start::Earliest(true), AuditFilter::default())
        .await
        .unwrap();
    let mut quick = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    for round in 0..10 {
        set_role(&client, "lincoln", "ann", ["admin", "volunteer"][round % 2]).await;
        let last = head(&client).await;
        within("the quick one's", Duration::from_secs(2), quick.until(last)).await;
    }
    let (code, reason, at) = slow.until_it_ends().await;
    assert_eq!((code, &*reason), (Code::ResourceExhausted, "SLOW_CONSUMER"));
    assert_eq!(at, slow.cursor);
    let rest = read(&server, &client, cursor(at), AuditFilter::default()).await;
    let expected = entries_where(&client, "true").await;
    let (taken, rest) = (slow.lines(), rest.lines());
    assert!(taken.len() < expected.len(), "{slow:?}");
    assert!(taken.into_iter().chain(rest).eq(expected));
}

#[tokio::test]
async fn streams_end_with_their_cursor_at_their_age_and_lose_nothing() {
    let (database, client) = changed().await;
    let mut config = config(&database.url);
    config.audit.age_max = Some(Duration::from_millis(150));
    let server = Server::start(config).await;
    let mut start = Start::Earliest(true);
    let mut taken = Vec::new();
    for round in 0..20 {
        let mut consumer = Consumer::start(&server.channel, start, AuditFilter::default())
            .await
            .unwrap();
        set_role(&client, "lincoln", "ann", ["admin", "volunteer"][round % 2]).await;
        let (code, reason, at) = consumer.until_it_ends().await;
        assert_eq!((code, &*reason), (Code::Unavailable, "STREAM_ENDED"));
        taken.extend(consumer.lines());
        start = cursor(at);
    }
    let mut last = Consumer::start(&server.channel, start, AuditFilter::default())
        .await
        .unwrap();
    last.until_it_ends().await;
    taken.extend(last.lines());
    assert_eq!(taken, entries_where(&client, "true").await);
}

#[tokio::test]
async fn streams_end_with_their_cursor_when_the_service_stops() {
    let (database, client) = changed().await;
    let mut server = serve(&database).await;
    let last = value(&client, "SELECT hallpass.head()").await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(
            read(
                &server,
                &client,
                Start::Earliest(true),
                AuditFilter::default(),
            )
            .await,
        );
    }
    server.begin_stop();
    for mut stream in streams {
        let (code, reason, at) = stream.until_it_ends().await;
        assert_eq!(
            (code, &*reason, &*at),
            (Code::Unavailable, "STREAM_ENDED", &*last)
        );
    }
    within("the service ends", Duration::from_secs(5), server.ended())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stream_ends_when_the_database_is_away_for_long() {
    let (database, client) = changed().await;
    let mut config = config(&database.url);
    config.audit.away_max = Duration::from_millis(100);
    let server = Server::start(config).await;
    let mut live = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    let name = value(&client, "SELECT current_database()").await;
    run(
        &client,
        &format!("ALTER DATABASE {name} CONNECTION LIMIT 0"),
    )
    .await;
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND usename = 'hallpass_service'";
    value(&client, cut).await;
    let (code, reason, at) = live.until_it_ends().await;
    assert_eq!(
        (code, &*reason),
        (Code::Unavailable, "DATABASE_UNAVAILABLE")
    );
    run(
        &client,
        &format!("ALTER DATABASE {name} CONNECTION LIMIT -1"),
    )
    .await;
    set_role(&client, "lincoln", "ann", "board_member").await;
    eventually("a stream goes on", async || {
        let resumed = Consumer::start(&server.channel, cursor(&*at), AuditFilter::default()).await;
        match resumed {
            Ok(mut resumed) => resumed.next().await.is_ok() && resumed.lines().len() == 1,
            Err(_) => false,
        }
    })
    .await;
}
