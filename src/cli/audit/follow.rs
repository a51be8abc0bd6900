//! A consumer that goes on from its last cursor through every break.
//!
//! Invariant: the cursor moves behind an event only once the sink has kept it; so what breaks in between comes again,
//! and only that.

use std::time::Duration;

use anyhow::{Context, bail};
use hallpass_client::{
    tonic::{Code, Status, Streaming},
    v1::{
        AuditEntry, AuditFilter, AuditGap, StreamAuditEntriesRequest, StreamAuditEntriesResponse,
        stream_audit_entries_request::Start, stream_audit_entries_response::Event,
    },
};
use tokio::time::{sleep, timeout};
use tonic_types::StatusExt;

use crate::{
    cli::list::{audit_client, explain_status},
    config::ClientSettings,
};

/// Waits between attempts: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// A stream sends a checkpoint every second; one that is silent for this long is dead.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// One entry may name tens of thousands of users; a batch is 1 MiB but for that.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Where a follower puts what it reads.
pub(super) trait Sink {
    /// Keeps what came, and says whether to go on.
    fn take(&mut self, events: Taken<'_>) -> anyhow::Result<Next>;
}

/// What a stream has sent.
pub(super) enum Taken<'a> {
    Entries(&'a [AuditEntry]),
    Gap(&'a AuditGap),
    /// Everything up to this cursor has been taken.
    Checkpoint(&'a str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    GoOn,
    Stop,
}

/// What is followed.
pub(super) struct Follow<'a> {
    pub(super) client: &'a ClientSettings,
    pub(super) filter: AuditFilter,
    pub(super) start: Start,
}

impl Follow<'_> {
    /// Follows until the sink has enough.
    ///
    /// # Errors
    /// When the service refuses, which trying again would not change, or the sink fails.
    pub(super) async fn run(&mut self, sink: &mut impl Sink) -> anyhow::Result<()> {
        let mut retry = RETRY_FIRST;
        let mut is_up = true;
        // The first attempt says at once what is wrong.
        let mut attempt = Some(self.open().await?);
        loop {
            let broken = match attempt.take() {
                Some(Ok(mut stream)) => match self.read(&mut stream, sink, &mut is_up).await? {
                    (Next::Stop, _) => return Ok(()),
                    (Next::GoOn, status) => {
                        if is_up {
                            retry = RETRY_FIRST;
                        }
                        status
                    }
                },
                Some(Err(status)) => status,
                None => Status::unavailable("nobody answers"),
            };
            if !may_pass(&broken) {
                bail!(explain_status(broken));
            }
            if is_up && reason(&broken) != "STREAM_ENDED" {
                tracing::warn!(error = %broken.message(), "the stream broke: going on from its cursor");
                is_up = false;
            }
            sleep(retry).await;
            retry = (retry * 2).min(RETRY_LAST);
            attempt = self.open().await.ok();
        }
    }

    /// Opens a stream behind what was taken. The outer error is of the connection.
    async fn open(&self) -> anyhow::Result<Result<Streaming<StreamAuditEntriesResponse>, Status>> {
        let mut client = audit_client(self.client)
            .await?
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let request = StreamAuditEntriesRequest {
            start: Some(self.start.clone()),
            filter: Some(self.filter.clone()),
        };
        let stream = client.stream_audit_entries(request).await;
        Ok(stream.map(hallpass_client::tonic::Response::into_inner))
    }

    /// Reads until the stream ends, one way or another.
    async fn read(
        &mut self,
        stream: &mut Streaming<StreamAuditEntriesResponse>,
        sink: &mut impl Sink,
        is_up: &mut bool,
    ) -> anyhow::Result<(Next, Status)> {
        loop {
            let message = match timeout(SILENCE_MAX, stream.message()).await {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return Ok((Next::GoOn, Status::unavailable("the stream ended"))),
                Ok(Err(status)) => return Ok((Next::GoOn, status)),
                Err(_) => return Ok((Next::GoOn, Status::unavailable("the stream is silent"))),
            };
            if !*is_up {
                tracing::info!("following the audit log again");
                *is_up = true;
            }
            let (next, cursor) = match message.event.context("an event of a newer service")? {
                Event::Entries(batch) => {
                    let last = batch.entries.last().map(|entry| entry.cursor.clone());
                    (sink.take(Taken::Entries(&batch.entries))?, last)
                }
                Event::Gap(gap) => (sink.take(Taken::Gap(&gap))?, Some(gap.to)),
                Event::Checkpoint(checkpoint) => {
                    let next = sink.take(Taken::Checkpoint(&checkpoint.cursor))?;
                    (next, Some(checkpoint.cursor))
                }
            };
            if let Some(cursor) = cursor {
                self.start = Start::Cursor(cursor);
            }
            if next == Next::Stop {
                return Ok((Next::Stop, Status::ok("")));
            }
        }
    }
}

/// Whether it may be otherwise next time: the service or its database is away or busy, or the connection broke.
fn may_pass(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::ResourceExhausted
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::Aborted
    )
}

fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    details
        .error_info()
        .map_or(String::new(), |info| info.reason.clone())
}
