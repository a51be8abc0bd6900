//! Streams of the audit log while memberships change: how late each entry arrives, counted from its commit.

use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use hallpass_client::{
    tonic::{Status, Streaming},
    v1::{
        StreamAuditEntriesRequest, StreamAuditEntriesResponse, stream_audit_entries_request::Start,
        stream_audit_entries_response::Event,
    },
};
use tokio::{sync::watch, task::JoinSet, time::sleep};

use super::{measure::Bench, own::Own, report::Row};
use crate::{cli::list::audit_client, load::Outcome};

/// For the last entries to arrive.
const SETTLING: Duration = Duration::from_millis(500);

impl Bench<'_> {
    /// A row in which each entry that a stream was sent counts as a call.
    pub(super) async fn audit(&self, own: &Own) -> anyhow::Result<Row> {
        let settings = self.settings;
        let (end, ends) = watch::channel(());
        let mut streams = JoinSet::new();
        for _ in 0..settings.streams {
            let request = StreamAuditEntriesRequest {
                start: Some(Start::Now(true)),
                filter: None,
            };
            let mut client = audit_client(&self.target.client).await?;
            let mut stream = client.stream_audit_entries(request).await?.into_inner();
            // The first message says that the stream stands.
            stream.message().await?.context("a stream ended")?;
            streams.spawn(lags(stream, ends.clone()));
        }
        let before = self.target.processor_time()?;
        own.write(settings.writes, sleep(settings.duration)).await?;
        sleep(SETTLING).await;
        let spent = self.target.processor_time_since(before)?;
        drop(end);
        let mut outcome = Outcome::new()?;
        while let Some(lags) = streams.join_next().await {
            for lag in lags?? {
                let micros = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
                outcome.answered_in.saturating_record(micros);
            }
        }
        outcome.answered = outcome.answered_in.len();
        outcome.elapsed = settings.duration;
        if outcome.answered == 0 {
            bail!("no entry arrived");
        }
        let what = format!("audit, {} streams, {}/s", settings.streams, settings.writes);
        Ok(Row::new(&what, &outcome, 1, spent, self.target.memory()?))
    }
}

/// What each entry took from its commit, by the clock of this machine.
async fn lags(
    mut stream: Streaming<StreamAuditEntriesResponse>,
    mut end: watch::Receiver<()>,
) -> Result<Vec<Duration>, Status> {
    let mut lags = Vec::new();
    loop {
        let message = tokio::select! {
            message = stream.message() => message?,
            _ = end.changed() => return Ok(lags),
        };
        #[allow(
            clippy::disallowed_methods,
            reason = "beside commits, whose time the database has from the same clock"
        )]
        let now = SystemTime::now();
        let Some(Event::Entries(entries)) = message.and_then(|message| message.event) else {
            continue;
        };
        let committed = entries.entries.iter().filter_map(|entry| entry.commit_time);
        lags.extend(committed.filter_map(|time| {
            let time = SystemTime::try_from(time).ok()?;
            Some(now.duration_since(time).unwrap_or_default())
        }));
    }
}
