//! Load that costs next to nothing to make: requests are encoded once, and of the answers only the frames' heads are read.
//! A real client would need more of the machine than the service that it loads.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{interval_at, timeout},
};

use crate::{
    frames::{
        DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, RST_STREAM, SETTINGS, WINDOW_UPDATE,
        check_headers, frame,
    },
    service::{LISTEN, Result},
};

/// As a real caller's pool has; together more streams than the service lets one caller have.
const CONNECTIONS: usize = 16;

/// Streams that the service allows on a connection.
const STREAMS_MAX: usize = 1_000;

/// An answer later than this is no answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often what is due is sent.
const PORTION: Duration = Duration::from_millis(2);

/// What came back.
pub(crate) struct Outcome {
    /// A second.
    pub(crate) answered: f64,
    /// Answered by a status alone, a second.
    pub(crate) refused: f64,
    /// Answered after [`PATIENCE`], reset, or not even sent, since the service took no more, a second.
    pub(crate) lost: f64,
    /// In microseconds, from sending.
    pub(crate) answered_in: Histogram<u64>,
    pub(crate) refused_in: Histogram<u64>,
}

/// How much is asked at once.
#[derive(Clone, Copy)]
pub(crate) enum Pace {
    /// So many are under way all the time.
    AtOnce(usize),
    /// So many a second are begun, whatever becomes of those before.
    ASecond(f64),
}

struct Ended {
    stream: u32,
    at: Instant,
    how: How,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Answered,
    Refused,
    Reset,
}

/// Asks these messages in turn for some time.
pub(crate) async fn run(messages: &[Vec<u8>], pace: Pace, time: Duration) -> Result<Outcome> {
    let requests: Arc<[Vec<u8>]> = messages.iter().map(|message| request(message)).collect();
    let mut connections = JoinSet::new();
    for index in 0..CONNECTIONS {
        let requests = Arc::clone(&requests);
        connections.spawn(connection(requests, index, pace, time));
    }
    let mut outcome = Outcome {
        answered: 0.0,
        refused: 0.0,
        lost: 0.0,
        answered_in: histogram()?,
        refused_in: histogram()?,
    };
    while let Some(ended) = connections.join_next().await {
        let (ended, unsent) = ended??;
        outcome.lost += unsent;
        for (how, took) in ended {
            let (count, histogram) = match how {
                _ if took > PATIENCE => (&mut outcome.lost, None),
                How::Answered => (&mut outcome.answered, Some(&mut outcome.answered_in)),
                How::Refused => (&mut outcome.refused, Some(&mut outcome.refused_in)),
                How::Reset => (&mut outcome.lost, None),
            };
            *count += 1.0;
            if let Some(histogram) = histogram {
                histogram.saturating_record(u64::try_from(took.as_micros())?);
            }
        }
    }
    for count in [
        &mut outcome.answered,
        &mut outcome.refused,
        &mut outcome.lost,
    ] {
        *count /= time.as_secs_f64();
    }
    Ok(outcome)
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000, 3)?)
}

/// Both frames of a request, without their stream.
fn request(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(0).to_be_bytes();
    let body = [&[0], length.as_slice(), message].concat();
    let headers = frame(HEADERS, END_HEADERS, 0, &check_headers());
    [headers, frame(DATA, END_STREAM, 0, &body)].concat()
}

async fn connection(
    requests: Arc<[Vec<u8>]>,
    index: usize,
    pace: Pace,
    time: Duration,
) -> Result<(Vec<(How, Duration)>, f64)> {
    let stream = TcpStream::connect(LISTEN).await?;
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.into_split();
    // Room for all answers: 2^30 for each stream, and for the connection.
    let room = [0, 4, 0x40, 0, 0, 0];
    let opening = [
        PREFACE,
        &frame(SETTINGS, 0, 0, &room),
        &frame(WINDOW_UPDATE, 0, 0, &room[2..]),
    ]
    .concat();
    write.write_all(&opening).await?;
    let under_way = Arc::new(AtomicUsize::new(0));
    let fewer = Arc::new(Notify::new());
    let (report, mut reported) = mpsc::unbounded_channel();
    let reader = {
        let (under_way, fewer) = (Arc::clone(&under_way), Arc::clone(&fewer));
        tokio::spawn(async move { read_answers(read, &under_way, &fewer, &report).await })
    };
    let sent = send(&mut write, &requests, index, pace, time, &under_way, &fewer).await?;
    let mut ended = Vec::with_capacity(sent.at.len());
    let all = async {
        while ended.len() < sent.at.len() {
            let Some(Ended { stream, at, how }) = reported.recv().await else {
                break;
            };
            let sent = sent.at[usize::try_from(stream / 2).unwrap_or(0)];
            ended.push((how, at - sent));
        }
    };
    // What has not come by then is lost anyway.
    let is_whole = timeout(PATIENCE, all).await.is_ok();
    reader.abort();
    #[allow(clippy::cast_precision_loss, reason = "a number of calls")]
    let unanswered = if is_whole {
        0.0
    } else {
        (sent.at.len() - ended.len()) as f64
    };
    Ok((ended, sent.unsent + unanswered))
}

/// When each stream's request was sent, and how many were not.
struct Sent {
    at: Vec<Instant>,
    unsent: f64,
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "numbers of calls, far from either end"
)]
async fn send(
    write: &mut OwnedWriteHalf,
    requests: &[Vec<u8>],
    index: usize,
    pace: Pace,
    time: Duration,
    under_way: &AtomicUsize,
    fewer: &Notify,
) -> Result<Sent> {
    let started = Instant::now();
    // One connection after the other: else all of them would wait for the answers to the first.
    let first = PORTION * u32::try_from(index)? / u32::try_from(CONNECTIONS)?;
    let mut portions = interval_at((started + first).into(), PORTION);
    let mut at: Vec<Instant> = Vec::new();
    let mut frames = Vec::new();
    while started.elapsed() < time {
        let due = match pace {
            Pace::AtOnce(most) => {
                at.len() + (most / CONNECTIONS).saturating_sub(under_way.load(Ordering::Relaxed))
            }
            Pace::ASecond(rate) => {
                (rate * started.elapsed().as_secs_f64() / CONNECTIONS as f64) as usize
            }
        };
        frames.clear();
        let now = Instant::now();
        let room = STREAMS_MAX.saturating_sub(under_way.load(Ordering::Relaxed));
        let count = due.saturating_sub(at.len()).min(room);
        for _ in 0..count {
            let stream = (at.len() * 2 + 1) as u32;
            append(
                &mut frames,
                &requests[(index + at.len() * CONNECTIONS) % requests.len()],
                stream,
            );
            at.push(now);
        }
        under_way.fetch_add(count, Ordering::Relaxed);
        write.write_all(&frames).await?;
        match pace {
            Pace::AtOnce(_) => drop(timeout(PORTION, fewer.notified()).await),
            Pace::ASecond(_) => drop(portions.tick().await),
        }
    }
    let unsent = match pace {
        Pace::AtOnce(_) => 0.0,
        Pace::ASecond(rate) => {
            (rate * time.as_secs_f64() / CONNECTIONS as f64 - at.len() as f64).max(0.0)
        }
    };
    Ok(Sent { at, unsent })
}

/// The request's frames with their stream.
fn append(frames: &mut Vec<u8>, request: &[u8], stream: u32) {
    let mut rest = request;
    while let [a, b, c, ..] = *rest {
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        frames.extend_from_slice(&rest[..5]);
        frames.extend_from_slice(&stream.to_be_bytes());
        frames.extend_from_slice(&rest[9..9 + length]);
        rest = &rest[9 + length..];
    }
}

/// Reports each stream that has ended, until the connection has.
async fn read_answers(
    mut read: OwnedReadHalf,
    under_way: &AtomicUsize,
    fewer: &Notify,
    report: &mpsc::UnboundedSender<Ended>,
) -> Result<()> {
    let mut buffer = vec![0; 1 << 18];
    let mut filled = 0;
    // Whether a stream's answer has begun with more than a status.
    let mut begun: Vec<bool> = Vec::new();
    loop {
        let count = read.read(&mut buffer[filled..]).await?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let at_now = Instant::now();
        let mut at = 0;
        while let Some(head) = buffer[at..filled].first_chunk::<9>() {
            let length =
                usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            if filled - at < 9 + length {
                break;
            }
            at += 9 + length;
            let (kind, flags) = (head[3], head[4]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let index = usize::try_from(stream / 2)?;
            if begun.len() <= index {
                begun.resize(index + 1, false);
            }
            let how = match kind {
                RST_STREAM if stream != 0 => How::Reset,
                HEADERS if flags & END_STREAM == 0 => {
                    begun[index] = true;
                    continue;
                }
                HEADERS if begun[index] => How::Answered,
                HEADERS => How::Refused,
                _ => continue,
            };
            under_way.fetch_sub(1, Ordering::Relaxed);
            fewer.notify_one();
            // Nobody listens any more when the time is up.
            drop(report.send(Ended {
                stream,
                at: at_now,
                how,
            }));
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
    }
}
