//! What is not there any more: a gap with both ends where retention or the owner removed it, DATA_LOSS where history was
//! lost; never an entry less without a word.

use std::time::SystemTime;

use hallpass_client::{
    tonic::Code,
    v1::{AuditFilter, AuditGap, stream_audit_entries_request::Start},
};
use tokio_postgres::Client;

use crate::{
    consumer::{Consumer, changed, cursor, entries_where, filters, read, serve},
    server::{head, run_sql, seq},
    sql::{lines, run, value},
};

/// Makes the log as if everything before the entry number `first` had been committed two years ago, and removes that.
async fn expire_before(client: &Client, first: i64) {
    let age = format!(
        "UPDATE hallpass.log SET committed_at = committed_at - interval '730 days' WHERE seq <= {first}"
    );
    run(client, &age).await;
    let step = "SELECT is_done FROM hallpass.remove_expired(365, 4)";
    while value(client, step).await == "f" {}
    let least = value(client, "SELECT min(seq) FROM hallpass.log").await;
    assert_eq!(least, first.to_string());
}

async fn ago(client: &Client, interval: &str) -> SystemTime {
    let sql = format!("SELECT now() - interval '{interval}'");
    client.query_one(&sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn what_retention_has_removed_is_a_gap_with_both_ends() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let all = entries_where(&client, "true").await;
    let seqs = lines(&client, "SELECT seq FROM hallpass.log ORDER BY seq").await;
    let first: i64 = seqs[seqs.len() / 2].parse().unwrap();
    let last_removed =
        "SELECT seq || '-' || lpad(to_hex(uid), 8, '0') FROM hallpass.log WHERE seq < ";
    let last_removed = value(
        &client,
        &format!("{last_removed} {first} ORDER BY seq DESC LIMIT 1"),
    )
    .await;
    let times = "SELECT committed_at - interval '1 hour' FROM hallpass.log ORDER BY seq LIMIT 1";
    run(&client, &format!("CREATE TABLE long_ago AS {times}")).await;
    expire_before(&client, first).await;
    let kept = entries_where(&client, "true").await;
    assert!(kept.len() < all.len());

    let from = async |start| read(&server, &client, start, AuditFilter::default()).await;
    // Who asks for what is kept has no gap, nor who had come to the end of what was removed.
    for start in [Start::Earliest(true), cursor(&*last_removed)] {
        let read = from(start.clone()).await;
        assert_eq!(
            (read.lines(), read.gaps),
            (kept.clone(), vec![]),
            "{start:?}"
        );
    }
    for line in &all[..all.len() - kept.len()] {
        let own = line.split('|').next().unwrap();
        let read = from(cursor(own)).await;
        assert_eq!(read.lines(), kept, "{own}");
        let gap = AuditGap {
            from: own.to_owned(),
            to: last_removed.clone(),
        };
        assert_eq!(read.gaps, [gap], "{own}");
        let again = from(cursor(&*read.gaps[0].to)).await;
        assert_eq!((again.lines(), again.gaps), (kept.clone(), vec![]));
    }
    let removed_since = ago(&client, "3 years").await;
    let read = from(Start::Since(removed_since.into())).await;
    assert_eq!(read.lines(), kept);
    let ends: Vec<_> = read.gaps.iter().map(|gap| (&*gap.from, &*gap.to)).collect();
    assert_eq!(ends, [("0-0", &*last_removed)]);
    // The entry that is kept though it is old was committed before: nothing since then is missing.
    let kept_since = ago(&client, "1 year").await;
    assert_eq!(from(Start::Since(kept_since.into())).await.gaps, []);
    // A cursor that was never of this log is nobody's gap once it is as new as what is kept.
    let foreign = format!("{first}-00000000");
    let consumer = Consumer::start(&server.channel, cursor(foreign), AuditFilter::default()).await;
    let (code, reason, _) = consumer.unwrap().until_it_ends().await;
    assert_eq!((code, &*reason), (Code::DataLoss, "CURSOR_UNKNOWN"));
}

#[tokio::test]
async fn an_entry_without_its_rows_is_a_gap() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let mut live = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    let gone = "SELECT seq || '-' || lpad(to_hex(uid), 8, '0') FROM hallpass.log ORDER BY seq OFFSET 8 LIMIT 1";
    let gone = value(&client, gone).await;
    let before = format!(
        "SELECT max(n) FROM permission_audit_log NATURAL JOIN (
        SELECT entry_id FROM hallpass.log WHERE seq < {} ORDER BY seq DESC LIMIT 1) of",
        seq(&gone)
    );
    let before = (seq(&gone), value(&client, &before).await);
    let delete = format!(
        "DELETE FROM permission_audit_log WHERE entry_id IN (SELECT entry_id FROM hallpass.log WHERE seq = {})",
        seq(&gone)
    );
    run(&client, &delete).await;
    for (filter, condition) in filters() {
        let read = read(&server, &client, Start::Earliest(true), filter).await;
        assert_eq!(read.lines(), entries_where(&client, &condition).await);
        assert_eq!(read.gaps.len(), 1, "{condition}");
        assert_eq!(read.gaps[0].to, gone, "{condition}");
    }
    let read = read(
        &server,
        &client,
        Start::Earliest(true),
        AuditFilter::default(),
    )
    .await;
    assert!(seq(read.gaps[0].from.split('.').next().unwrap()) < before.0);
    assert!(
        read.gaps[0].from.ends_with(&format!(".{}", before.1)),
        "{:?}",
        read.gaps
    );
    // Of what comes, too: rows that are gone before anybody has read them.
    let sql = "BEGIN; UPDATE profiles SET role = 'parent_member' WHERE role <> 'parent_member';
               DELETE FROM permission_audit_log WHERE created_at = now(); COMMIT";
    run(&client, sql).await;
    live.until(head(&client).await).await;
    assert_eq!((live.lines().len(), live.gaps.len()), (0, 1));
    assert_eq!(
        live.gaps[0].to,
        value(&client, "SELECT hallpass.head()").await
    );
}

#[tokio::test]
async fn no_stream_passes_a_history_that_was_lost() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let mut live = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    let lost_cursor = live.cursor.clone();
    // The last three commits are lost, and others come under their numbers before anybody has looked.
    let lose = "BEGIN; LOCK TABLE hallpass.log;
                DELETE FROM hallpass.log WHERE seq > (SELECT max(seq) - 3 FROM hallpass.log);
                DELETE FROM hallpass.log_org WHERE seq > (SELECT max(seq) FROM hallpass.log);
                SELECT setval('hallpass.log_seq', (SELECT max(seq) FROM hallpass.log));
                UPDATE profiles SET role = 'admin' WHERE org_id = :lincoln;
                UPDATE profiles SET role = 'volunteer' WHERE org_id = :lincoln;
                UPDATE profiles SET role = 'admin' WHERE org_id = :lincoln;
                UPDATE profiles SET role = 'volunteer' WHERE org_id = :lincoln; COMMIT";
    run_sql(&client, lose).await;
    let (code, reason, at) = live.until_it_ends().await;
    assert_eq!((code, &*reason), (Code::DataLoss, "CURSOR_UNKNOWN"));
    assert_eq!(at, lost_cursor);
    assert_eq!(live.lines(), [""; 0]);
    let mut resumed = Consumer::start(&server.channel, cursor(lost_cursor), AuditFilter::default())
        .await
        .unwrap();
    assert_eq!(resumed.until_it_ends().await.0, Code::DataLoss);
}
