//! A database that does not answer: callers leave when they said they would, and nobody else pays for it.

use std::time::{Duration, Instant};

use hallpass_client::tonic::{Code, IntoRequest};
use tokio_postgres::Client;

use crate::{
    database::{Database, eventually},
    server::{APPROVE, Server, config, fill, now, question, set_role, within},
};

const DEADLINE: Duration = Duration::from_millis(50);

/// A deadline and what a busy machine adds.
const DEADLINE_MAX: Duration = Duration::from_secs(2);

const PROMPT: Duration = Duration::from_secs(4);

/// The refresh in the background is nobody's question.
pub(crate) const WAITING: &str = "
SELECT count(*)::integer FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'hallpass' AND wait_event_type = 'Lock'
  AND query NOT LIKE '%refresh%'";

/// A lock that keeps everybody from reading a table, until it is released or dropped.
pub(crate) struct TableLock {
    /// Its connection ends with it, and the lock with the connection.
    _holder: Client,
    observer: Client,
}

impl TableLock {
    pub(crate) async fn take(database: &Database, table: &str) -> Self {
        let holder = database.client().await;
        let lock = format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        holder.batch_execute(&lock).await.unwrap();
        Self {
            _holder: holder,
            observer: database.client().await,
        }
    }

    pub(crate) fn release(self) {}

    pub(crate) async fn until_waiting(&self, statements: i32) {
        eventually("statements wait for the lock", async || {
            let row = self.observer.query_one(WAITING, &[]).await;
            row.unwrap().get::<_, i32>(0) >= statements
        })
        .await;
    }
}

#[tokio::test]
async fn a_caller_s_deadline_is_kept_and_costs_nobody_else() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    let lock = TableLock::take(&database, "public.profiles").await;
    for explain in [false, true] {
        // The matrix could answer other questions: it is not locked.
        let mut asked = now(question("lincoln", "stranger", APPROVE));
        asked.explain = explain;
        let mut request = asked.into_request();
        request.set_timeout(DEADLINE);
        let began = Instant::now();
        let status = server.try_check(request).await.unwrap_err();
        assert!(
            [Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()),
            "{status:?}"
        );
        assert!((DEADLINE..DEADLINE_MAX).contains(&began.elapsed()));
    }
    // What is cached needs no database.
    for _ in 0..100 {
        let answer = server.check("lincoln", "bob", APPROVE).await;
        assert!(answer.is_cached(), "{answer}");
    }
    lock.release();
    let asked = server.check_now("lincoln", "stranger", APPROVE);
    let answer = within("an answer", PROMPT, asked);
    assert_eq!(answer.await.said, "deny NOT_A_MEMBER");
    server.stop().await;
}

/// More callers than the pool has connections, for one user and for many; every second one leaves.
#[tokio::test]
async fn callers_who_leave_cancel_nothing_for_those_who_stay() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    set_role(&client, "lincoln", "eve", "board_member").await;
    let lock = TableLock::take(&database, "public.profiles").await;
    let callers: Vec<_> = (0..40)
        .map(|index| {
            let user = match index % 4 {
                0 | 1 => "eve".to_owned(),
                _ => format!("stranger {}", index / 4),
            };
            let (mut client, asked) = (server.client(), question("lincoln", &user, APPROVE));
            tokio::spawn(async move { client.check_permission(asked).await })
        })
        .collect();
    lock.until_waiting(1).await;
    for leaver in callers.iter().step_by(2) {
        leaver.abort();
    }
    // A round trip: the service has heard of them.
    server.check("lincoln", "bob", APPROVE).await;
    lock.release();
    for (index, caller) in callers.into_iter().enumerate() {
        match within("an answer", PROMPT, caller).await {
            Ok(answer) => assert_eq!(answer.unwrap().into_inner().allowed, index % 4 == 1),
            Err(cancelled) => assert!(cancelled.is_cancelled() && index % 2 == 0),
        }
    }
    let answer = server.check("lincoln", "eve", APPROVE).await;
    assert!(answer.is_cached() && answer.response.allowed, "{answer}");
    server.stop().await;
}
