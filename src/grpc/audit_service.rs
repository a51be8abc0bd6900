//! `hallpass.v1.AuditService`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status};

use super::{
    parse::{self, AuditQuery, AuditStart, Fields},
    status, v1,
};
use crate::{
    audit::{
        Limits,
        stream::{AuditStream, Event, Start, StreamEnd},
        tail::Tail,
    },
    model::Cursor,
    store::{
        Store, StoreError,
        audit::{AuditEntry, list},
        pool::Connection,
    },
    trail,
};

/// Streams at once: each holds a few batches at most.
const STREAMS_MAX: usize = 2_000;

/// Events that wait for a caller to take them; the stream waits, too, when there are more.
const EVENTS_WAITING_MAX: usize = 2;

/// Serves the audit log.
pub struct AuditService {
    store: Arc<Store>,
    tail: Tail,
    limits: Limits,
    streams: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl AuditService {
    /// Streams run in `tasks`, and end, each with its cursor, when `stop` is cancelled.
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        tail: Tail,
        limits: Limits,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self {
            store,
            tail,
            limits,
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            tasks,
            stop,
        }
    }

    async fn start(&self, start: AuditStart) -> Result<Start, Status> {
        let position = match start {
            AuditStart::After(cursor) => return Ok(Start::After(cursor)),
            AuditStart::Earliest => return Ok(Start::Earliest),
            AuditStart::Now => self.ask(Connection::audit_head).await?,
            AuditStart::Since(time) => {
                self.ask(move |connection: Connection| connection.audit_position_before(time))
                    .await?
            }
        };
        Ok(Start::After(Cursor::after(position)))
    }

    /// Reads as what people ask for is read: in a task of its own, for a caller who goes away must not leave a
    /// connection with half a question.
    async fn ask<T, Answer>(
        &self,
        query: impl FnOnce(Connection) -> Answer,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        Answer: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let connection = self.store.reads.acquire().await?;
        let answer = tokio::spawn(trail::carried(query(connection))).await;
        answer.unwrap_or_else(|panic| Err(StoreError::Wrong(panic.to_string())))
    }
}

#[tonic::async_trait]
impl v1::audit_service_server::AuditService for AuditService {
    type StreamAuditEntriesStream =
        Pin<Box<dyn Stream<Item = Result<v1::StreamAuditEntriesResponse, Status>> + Send>>;

    async fn stream_audit_entries(
        &self,
        request: Request<v1::StreamAuditEntriesRequest>,
    ) -> Result<Response<Self::StreamAuditEntriesStream>, Status> {
        let caller = parse::caller(&request)?;
        let standing = parse::standing(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let start = fields.audit_start(request.start);
        let filter = fields.audit_filter(request.filter);
        let (start, filter) = fields.all_fit(start.zip(filter))?;
        let Ok(permit) = Arc::clone(&self.streams).try_acquire_owned() else {
            return Err(status::too_many_streams());
        };
        let start = self.start(start).await?;
        let (events, waiting) = mpsc::channel(EVENTS_WAITING_MAX);
        let (ended, end) = oneshot::channel();
        let (store, tail) = (Arc::clone(&self.store), self.tail.clone());
        let mut stream = AuditStream::new(store, tail, self.limits, filter, start, events);
        let (age_max, stop) = (self.limits.age_max, self.stop.clone());
        self.tasks.spawn(async move {
            let over = tokio::select! {
                end = standing.guard(stream.run()) => end,
                () = stop.cancelled() => Ok(StreamEnd::Over),
                () = age(age_max) => Ok(StreamEnd::Over),
            };
            let end = match over {
                Ok(end) => status::stream_end(&end, stream.cursor),
                Err(lost) => {
                    tracing::info!(caller = %caller.identity, reason = %lost, "an audit stream ends");
                    status::stream_lost_standing(lost, stream.cursor)
                }
            };
            // A caller who has gone needs no cursor.
            let _gone = ended.send(end);
        });
        let events = ReceiverStream::new(waiting).map(|event| Ok(event_message(event)));
        let end = stream::once(async move {
            let end = end.await.unwrap_or_else(|_| status::stream_lost());
            // Held until the caller has taken the last event, which is somewhere until then.
            drop(permit);
            Err(end)
        });
        Ok(Response::new(Box::pin(events.chain(end))))
    }

    async fn list_audit_entries(
        &self,
        request: Request<v1::ListAuditEntriesRequest>,
    ) -> Result<Response<v1::ListAuditEntriesResponse>, Status> {
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let filter = fields.audit_filter(request.filter);
        let query = filter.as_ref().map(AuditQuery);
        let page = fields.audit_page(request.page_size, &request.page_token, query.as_ref());
        let filter = fields.all_fit(filter.as_ref())?;
        let asked = filter.clone();
        let list = self
            .ask(async move |connection: Connection| {
                connection
                    .audit_list(&asked, page.after, page.size, list::SCAN_MAX)
                    .await
            })
            .await?;
        let query = AuditQuery(filter);
        Ok(Response::new(v1::ListAuditEntriesResponse {
            entries: list.entries.into_iter().map(entry_message).collect(),
            next_page_token: list.next.map_or_else(String::new, |next| query.token(next)),
        }))
    }
}

/// Returns when a stream is this old.
async fn age(age_max: Option<Duration>) {
    match age_max {
        Some(age_max) => sleep(age_max).await,
        None => std::future::pending().await,
    }
}

fn event_message(event: Event) -> v1::StreamAuditEntriesResponse {
    use v1::stream_audit_entries_response::Event as Message;
    let event = match event {
        Event::Entries(entries) => Message::Entries(v1::AuditEntries {
            entries: entries.into_iter().map(entry_message).collect(),
        }),
        Event::Checkpoint(cursor, time) => Message::Checkpoint(v1::AuditCheckpoint {
            cursor: cursor.to_string(),
            time: Some(time.into()),
        }),
        Event::Gap(from, to) => Message::Gap(v1::AuditGap {
            from: from.to_string(),
            to: to.to_string(),
        }),
    };
    v1::StreamAuditEntriesResponse { event: Some(event) }
}

fn entry_message(entry: AuditEntry) -> v1::AuditEntry {
    let named = |prefix: &str, name: &str| format!("{prefix}{name}");
    let change_type = v1::ChangeType::from_str_name(&named("CHANGE_TYPE_", &entry.change_type));
    let actor_source = v1::ActorSource::from_str_name(&named("ACTOR_SOURCE_", &entry.actor_source));
    let id = |id: Option<uuid::Uuid>| id.map_or_else(String::new, |id| id.to_string());
    v1::AuditEntry {
        cursor: entry
            .cursor
            .map_or_else(String::new, |cursor| cursor.to_string()),
        id: entry.id.to_string(),
        organization_id: id(entry.organization.map(|organization| organization.0)),
        permission: entry.permission.unwrap_or_default(),
        affected_user_id: id(entry.affected_user.map(|user| user.0)),
        table: entry.table,
        change_type: change_type.unwrap_or_default().into(),
        before: entry.before.unwrap_or_default(),
        after: entry.after.unwrap_or_default(),
        changed_fields: entry.changed_fields,
        actor_user_id: id(entry.actor.map(|user| user.0)),
        actor_profile_id: id(entry.actor_profile),
        actor_source: actor_source.unwrap_or_default().into(),
        ip_address: entry.ip_address.unwrap_or_default(),
        user_agent: entry.user_agent.unwrap_or_default(),
        request_id: entry.request_id.unwrap_or_default(),
        session_id: entry.session_id.unwrap_or_default(),
        trace_id: entry.trace_id.unwrap_or_default(),
        database_role: entry.database_role,
        database_login: entry.database_login,
        client_address: entry.client_address.unwrap_or_default(),
        application_name: entry.application_name.unwrap_or_default(),
        transaction_id: entry.transaction_id.unwrap_or_default(),
        transaction_time: Some(entry.transaction_time.into()),
        commit_time: entry.commit_time.map(Into::into),
    }
}
