//! `/v1/audit`: the audit log in pages, and as Server-Sent Events.
//!
//! Invariant: every event has the id that a reader goes on from, so a browser that has lost its connection resumes where it
//! was by itself; what a message of gRPC's holds is sent in one piece, and nothing waits here.

mod entry;
mod query;

use std::future;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderName, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use utoipa::ToSchema;

use self::{
    entry::AuditEntry,
    query::{ListQuery, StreamQuery},
};
use super::{
    Services,
    call::{Call, InQuery, Json, answer},
    failure::{self, Failure},
};
use crate::grpc::v1::{
    self, audit_service_server::AuditService, stream_audit_entries_response::Event,
};

/// Comes before the first event: when a reader is to come back after the end, in milliseconds. A server that is restarted is
/// there again by then, or its neighbour is.
const RETRY: &str = "retry: 1000\n\n";

/// Some entries, newest first.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditPage {
    entries: Vec<AuditEntry>,
    /// For the next page; left out on the last.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    next_page_token: String,
}

impl From<v1::ListAuditEntriesResponse> for AuditPage {
    fn from(page: v1::ListAuditEntriesResponse) -> Self {
        Self {
            entries: page.entries.into_iter().map(Into::into).collect(),
            next_page_token: page.next_page_token,
        }
    }
}

/// Lists entries of the audit log in pages, newest first.
#[utoipa::path(
    get,
    path = "/v1/audit",
    operation_id = "list_audit_entries",
    tag = "Audit",
    params(ListQuery),
    responses(
        (status = 200, description = "A page", body = AuditPage),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
pub(super) async fn list(
    State(services): State<Services>,
    call: Call,
    InQuery(query): InQuery<ListQuery>,
) -> Result<Json<AuditPage>, Failure> {
    let request = call.with(query.into());
    answer(services.audit.list_audit_entries(request).await)
}

/// Sends the entries from a place in the log on, and goes on as they are committed.
///
/// Each event's `id` is the cursor to go on from, and its data is JSON. `entry`: a changed row. `checkpoint`, at least once a
/// second while nothing else comes: everything up to `cursor` that fits has been sent. `gap`: what came after `from` up to `to`
/// was removed before it could be sent. `end`, the last: why, as `error` and `code`, and the `cursor` to go on from.
///
/// A browser's `EventSource` comes back with `Last-Event-ID` by itself, which wins over where the query says to begin.
#[utoipa::path(
    get,
    path = "/v1/audit/stream",
    operation_id = "stream_audit_entries",
    tag = "Audit",
    params(
        StreamQuery,
        (
            "Last-Event-ID" = Option<String>, Header,
            description = "The id of the last event that was dealt with: go on after it",
            example = "812-5f0c9ae1.20",
        ),
    ),
    responses(
        (status = 200, description = "Server-Sent Events", body = String, content_type = "text/event-stream"),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
pub(super) async fn stream(
    State(services): State<Services>,
    call: Call,
    InQuery(query): InQuery<StreamQuery>,
) -> Result<Response, Failure> {
    let request = query.into_message(call.last_event_id())?;
    let events = services.audit.stream_audit_entries(call.with(request));
    let mut events = events.await?.into_inner();
    // A cursor that leads nowhere is refused with a status, for a browser would come back with it for ever.
    let first = match events.next().await {
        Some(Ok(first)) => first,
        Some(Err(refused)) => return Err(not_begun(refused)),
        None => return Err(Status::internal("a stream without an event").into()),
    };
    let first = text(first).map(|first| format!("{RETRY}{first}"));
    let rest = events.map(|event| event.map_or_else(|end| end_text(&end), text));
    let body = Body::from_stream(stream::once(future::ready(first)).chain(rest));
    // What nginx has to be told, so that events come as they are made.
    let unbuffered = (HeaderName::from_static("x-accel-buffering"), "no");
    let headers = [(CONTENT_TYPE, "text/event-stream"), unbuffered];
    Ok((headers, body).into_response())
}

/// What a cursor stands for was lost, which is no failure of the server's.
fn not_begun(refused: Status) -> Failure {
    match refused.code() {
        Code::DataLoss => Failure::with_http(refused, StatusCode::GONE),
        _ => refused.into(),
    }
}

/// An error breaks the connection off, and the reader comes back to where it was.
type Text = Result<String, serde_json::Error>;

fn text(message: v1::StreamAuditEntriesResponse) -> Text {
    match message.event {
        Some(Event::Entries(batch)) => (batch.entries.into_iter())
            .map(|entry| event("entry", &entry.cursor.clone(), &AuditEntry::from(entry)))
            .collect(),
        Some(Event::Checkpoint(checkpoint)) => {
            let (cursor, time) = (&*checkpoint.cursor, checkpoint.time.unwrap_or_default());
            let time = time.to_string();
            event("checkpoint", cursor, &Checkpoint { cursor, time })
        }
        Some(Event::Gap(gap)) => {
            let (from, to) = (&*gap.from, &*gap.to);
            event("gap", to, &Gap { from, to })
        }
        None => Ok(String::new()),
    }
}

fn end_text(end: &Status) -> Text {
    let info = end.get_details_error_info();
    let cursor = info.and_then(|mut info| info.metadata.remove("cursor"));
    let data = End {
        error: end.message(),
        code: failure::code(end),
        cursor: cursor.as_deref(),
    };
    event("end", cursor.as_deref().unwrap_or_default(), &data)
}

#[derive(Serialize)]
struct Checkpoint<'a> {
    cursor: &'a str,
    time: String,
}

#[derive(Serialize)]
struct Gap<'a> {
    from: &'a str,
    to: &'a str,
}

#[derive(Serialize)]
struct End<'a> {
    error: &'a str,
    code: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<&'a str>,
}

/// One event. Neither JSON nor a cursor has a line break in it.
fn event(name: &str, id: &str, data: &impl Serialize) -> Text {
    let data = serde_json::to_string(data)?;
    // An empty id would make a reader forget where it is.
    Ok(match id {
        "" => format!("event: {name}\ndata: {data}\n\n"),
        id => format!("event: {name}\nid: {id}\ndata: {data}\n\n"),
    })
}
