//! Followers of the audit log, one a replica: each goes on from its last cursor through every fault, and in the end has
//! what is in the log, in order, nothing lost and nothing twice.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use hallpass_client::{
    tonic::Code,
    v1::{AuditFilter, stream_audit_entries_request::Start},
};
use tokio::time::{sleep, timeout};

use crate::{
    consumer::{Consumer, cursor},
    database::connect,
    sql::lines,
};

use super::Run;

/// A stream sends a checkpoint every second; one that is silent for longer than any fault is given up.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// The pause before a stream is opened again.
const RETRY: Duration = Duration::from_millis(50);

/// How long everything may take to arrive once nobody writes any more.
const ARRIVAL_MAX: Duration = Duration::from_secs(60);

const CURSORS: &str = "
SELECT l.seq || '-' || lpad(to_hex(l.uid), 8, '0') || '.' || a.n
FROM hallpass.log l JOIN public.permission_audit_log a ON (a.entry_id, a.created_at) = (l.entry_id, l.created_at)
ORDER BY l.seq, a.n";

/// What one of them has.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) cursors: Vec<String>,
    /// Everything up to this entry is there.
    reached: i64,
    resumed: u64,
    /// Its cursor was lost with its commit: it forgets everything, and begins again.
    started_over: u64,
}

/// Follows a replica's streams until the run is over.
pub(super) async fn follow(run: Arc<Run>, replica: usize) {
    let mut start = Start::Earliest(true);
    while !run.over.load(Ordering::Relaxed) {
        let channel = &run.replicas[replica].channel;
        let opened = Consumer::start(channel, start.clone(), AuditFilter::default());
        if let Ok(Ok(mut consumer)) = timeout(SILENCE_MAX, opened).await {
            take(&run, replica, &mut consumer, &mut start).await;
        }
        run.auditors[replica].lock().unwrap().resumed += 1;
        sleep(RETRY).await;
    }
}

/// Takes from one stream until it ends.
async fn take(run: &Run, replica: usize, consumer: &mut Consumer, start: &mut Start) {
    while !run.over.load(Ordering::Relaxed) {
        let Ok(next) = timeout(SILENCE_MAX, consumer.wait()).await else {
            return;
        };
        let mut taken = run.auditors[replica].lock().unwrap();
        match next {
            Ok(()) => {
                assert_eq!(consumer.gaps, []);
                let entries = consumer.entries.drain(..);
                taken.cursors.extend(entries.map(|entry| entry.cursor));
                *start = cursor(&*consumer.cursor);
                // A cursor with a row may stand before others of its entry.
                if let Some((seq, _)) = consumer.cursor.split_once('-')
                    && !consumer.cursor.contains('.')
                {
                    taken.reached = seq.parse().unwrap();
                }
            }
            Err(status) if status.code() == Code::DataLoss => {
                taken.cursors.clear();
                taken.started_over += 1;
                *start = Start::Earliest(true);
                return;
            }
            Err(_) => return,
        }
    }
}

/// Nobody writes any more: compares what was taken with what is there. Returns what is to be printed, and complaints.
pub(super) async fn compare(run: &Run) -> (String, Vec<String>) {
    let client = connect(&run.url).await;
    let head = crate::server::head(&client).await;
    let arrived = async {
        for auditor in &run.auditors {
            while auditor.lock().unwrap().reached < head {
                sleep(RETRY).await;
            }
        }
    };
    let in_time = timeout(ARRIVAL_MAX, arrived).await.is_ok();
    let mut expected = lines(&client, CURSORS).await;
    // An inspection may log something even now.
    let is_old =
        |cursor: &String| cursor.split('-').next().unwrap().parse::<i64>().unwrap() <= head;
    expected.retain(is_old);
    let (mut lost, mut resumed, mut started_over) = (0, 0, 0);
    let mut complaints = Vec::new();
    for (replica, auditor) in run.auditors.iter().enumerate() {
        let mut taken = auditor.lock().unwrap();
        taken.cursors.retain(is_old);
        let there: HashSet<&String> = taken.cursors.iter().collect();
        let missing = (expected.iter())
            .filter(|cursor| !there.contains(cursor))
            .count();
        lost += missing;
        resumed += taken.resumed;
        started_over += taken.started_over;
        if taken.cursors != expected {
            complaints.push(format!(
                "the audit stream of replica {replica} has {} entries of {}, and lacks {missing}",
                taken.cursors.len(),
                expected.len()
            ));
        }
    }
    if !in_time {
        complaints.push(format!(
            "audit streams were not at the head after {ARRIVAL_MAX:?}"
        ));
    }
    let printed = format!(
        "audit streams: {} of {} entries each, resumed {resumed} times, begun again {started_over} times where a \
         restore had lost their cursor; {lost} entries lost, {} streams that differ from the log",
        run.auditors.len(),
        expected.len(),
        complaints.len()
    );
    (printed, complaints)
}
