//! HTTP/2 as no client would speak it: frames written by hand, each attacker at a stated pace.

use std::{
    io::Write,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use flate2::{Compression, write::GzEncoder};
use prost::Message;
use tokio::{
    io::{AsyncWriteExt, copy, sink},
    net::{
        TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep},
};

use uuid::Uuid;

use crate::service::{LISTEN, Question, Result, question};

/// Attackers come from another address of loopback than the caller who behaves well.
const FROM: &str = "127.0.0.2:0";

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

const CANCEL: [u8; 4] = [0, 0, 0, 8];

/// How often attackers have connected: more often than there are attackers, where the service throws them out.
pub(crate) static CONNECTED: AtomicU64 = AtomicU64::new(0);

/// Waits before it connects again after it was thrown out.
const RECONNECT: Duration = Duration::from_millis(20);

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let mut frame = Vec::with_capacity(9 + payload.len());
    frame.extend_from_slice(&length[1..]);
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The header block of a check, without indexing, so that every one is the same.
pub(crate) fn check_headers() -> Vec<u8> {
    headers_of("/hallpass.v1.PermissionService/CheckPermission", &[])
}

/// As of a check, of another method and with these fields too.
fn headers_of(path: &str, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let mut literal = |name: &[u8], value: &[u8]| {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap_or(0));
            block.extend_from_slice(text);
        }
    };
    literal(b":path", path.as_bytes());
    literal(b":authority", LISTEN.as_bytes());
    literal(b"content-type", b"application/grpc");
    literal(b"te", b"trailers");
    for (name, value) in fields {
        literal(name.as_bytes(), value.as_bytes());
    }
    block
}

/// So many header fields of about 100 bytes.
fn padding(fields: usize) -> Vec<u8> {
    let field = [b"\x00\x04x-xx\x5e".as_slice(), &[b'x'; 0x5e]].concat();
    field.repeat(fields)
}

/// A connection of an attacker's; what the service answers is read and forgotten.
struct Attacker {
    write: OwnedWriteHalf,
    reads: JoinHandle<()>,
    stream: u32,
}

impl Drop for Attacker {
    fn drop(&mut self) {
        self.reads.abort();
    }
}

impl Attacker {
    async fn connect(settings: &[u8]) -> Result<Self> {
        let (mut read, mut write) = connect().await?.into_split();
        write.write_all(PREFACE).await?;
        write.write_all(&frame(SETTINGS, 0, 0, settings)).await?;
        Ok(Self {
            write,
            reads: tokio::spawn(async move { forget(&mut read).await }),
            stream: 1,
        })
    }

    fn next_stream(&mut self) -> u32 {
        let stream = self.stream;
        self.stream += 2;
        stream
    }

    async fn write(&mut self, frames: &[u8]) -> Result<()> {
        if self.reads.is_finished() {
            return Err("the service has closed the connection".into());
        }
        self.write.write_all(frames).await?;
        Ok(())
    }
}

async fn forget(read: &mut OwnedReadHalf) {
    // Closed or broken is the same here.
    drop(copy(read, &mut sink()).await);
}

async fn connect() -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(FROM.parse()?)?;
    let stream = socket.connect(LISTEN.parse()?).await?;
    CONNECTED.fetch_add(1, Ordering::Relaxed);
    Ok(stream)
}

/// Writes what `next` makes at every tick, on a new connection where the last was closed. Never ends by itself.
async fn flood(every: Duration, settings: &[u8], mut next: impl FnMut(&mut Attacker) -> Vec<u8>) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let Ok(mut attacker) = Attacker::connect(settings).await else {
            sleep(RECONNECT).await;
            continue;
        };
        loop {
            ticks.tick().await;
            let frames = next(&mut attacker);
            if attacker.write(&frames).await.is_err() {
                break;
            }
        }
        sleep(RECONNECT).await;
    }
}

/// Opens a stream and resets it, 50 times every 10 ms.
pub(crate) async fn rapid_reset() {
    let headers = check_headers();
    let next = |attacker: &mut Attacker| {
        let mut frames = Vec::new();
        for _ in 0..50 {
            let stream = attacker.next_stream();
            frames.extend(frame(HEADERS, END_HEADERS, stream, &headers));
            frames.extend(frame(RST_STREAM, 0, stream, &CANCEL));
        }
        frames
    };
    flood(Duration::from_millis(10), &[], next).await;
}

/// Headers that never end: a frame of 4 kB of them every 2 ms.
pub(crate) async fn continuation() {
    let more = padding(40);
    let next = |attacker: &mut Attacker| {
        if attacker.stream == 1 {
            attacker.next_stream();
            return frame(HEADERS, 0, 1, &check_headers());
        }
        frame(CONTINUATION, 0, 1, &more)
    };
    flood(Duration::from_millis(2), &[], next).await;
}

/// Headers that come byte by byte, one a second.
pub(crate) async fn slow_headers() {
    let headers = frame(HEADERS, END_HEADERS, 1, &check_headers());
    let mut at = 0;
    let next = |attacker: &mut Attacker| {
        if attacker.stream == 1 {
            attacker.next_stream();
            at = 0;
        }
        at += 1;
        headers[at - 1..at].to_vec()
    };
    flood(Duration::from_secs(1), &[], next).await;
}

/// A request with 64 kB of metadata every 20 ms.
pub(crate) async fn large_metadata() {
    let block = padding(160);
    let next = |attacker: &mut Attacker| {
        let stream = attacker.next_stream();
        let mut frames = frame(HEADERS, END_STREAM, stream, &check_headers());
        for part in 0..4 {
            let flags = if part == 3 { END_HEADERS } else { 0 };
            frames.extend(frame(CONTINUATION, flags, stream, &block));
        }
        frames
    };
    flood(Duration::from_millis(20), &[], next).await;
}

/// The beginning of a message that says it has 4 GB, every 20 ms.
pub(crate) async fn large_messages() {
    let headers = check_headers();
    let mut message = vec![0, 0xff, 0xff, 0xff, 0xff];
    message.resize(1 << 10, 0);
    let next = |attacker: &mut Attacker| {
        let stream = attacker.next_stream();
        let mut frames = frame(HEADERS, END_HEADERS, stream, &headers);
        frames.extend(frame(DATA, 0, stream, &message));
        frames
    };
    flood(Duration::from_millis(20), &[], next).await;
}

/// Opens 100 requests every 10 ms, up to 1,000 at a time, and sends none of their messages.
pub(crate) async fn streams_held_open() {
    let headers = check_headers();
    let mut opened = 0;
    let next = |attacker: &mut Attacker| {
        if attacker.stream == 1 {
            opened = 0;
        }
        let mut frames = Vec::new();
        while opened < 1_000 && frames.len() < 100 * (headers.len() + 9) {
            opened += 1;
            let stream = attacker.next_stream();
            frames.extend(frame(HEADERS, END_HEADERS, stream, &headers));
        }
        frames
    };
    flood(Duration::from_millis(10), &[], next).await;
}

/// Asks 10 checks every 10 ms, up to 1,000 at a time, and gives no answer room to be sent.
pub(crate) async fn answers_not_taken() {
    // SETTINGS_INITIAL_WINDOW_SIZE is 0.
    let no_room = [0, 4, 0, 0, 0, 0];
    let headers = check_headers();
    let message = question(Uuid::nil(), Uuid::nil(), Question::Cached).encode_to_vec();
    let length = u8::try_from(message.len()).unwrap_or(0);
    let body = [&[0, 0, 0, 0, length], message.as_slice()].concat();
    let next = |attacker: &mut Attacker| {
        let mut frames = Vec::new();
        for _ in 0..10 {
            if attacker.stream >= 2_000 {
                break;
            }
            let stream = attacker.next_stream();
            frames.extend(frame(HEADERS, END_HEADERS, stream, &headers));
            frames.extend(frame(DATA, END_STREAM, stream, &body));
        }
        frames
    };
    flood(Duration::from_millis(10), &no_room, next).await;
}

const BATCH: &str = "/hallpass.v1.PermissionService/BatchCheckPermissions";

/// A message in frames of its stream, unfinished or to its end.
fn data(stream: u32, packed: u8, message: &[u8], last_flags: u8) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(0).to_be_bytes();
    let body = [&[packed], length.as_slice(), message].concat();
    let parts: Vec<&[u8]> = body.chunks(16 << 10).collect();
    let last = parts.len() - 1;
    let frames = parts.iter().enumerate().map(|(index, part)| {
        let flags = if index == last { last_flags } else { 0 };
        frame(DATA, flags, stream, part)
    });
    frames.flatten().collect()
}

/// Asks a batch of 10,000 malformed items every 100 ms, up to 1,000, and gives no answer room to be sent.
pub(crate) async fn malformed_batches_not_taken() {
    let headers = headers_of(BATCH, &[]);
    // Items of no fields: 20 kB, within the window that the service gives to begin with.
    let items = [10, 0].repeat(10_000);
    let next = |attacker: &mut Attacker| {
        if attacker.stream >= 2_000 {
            return Vec::new();
        }
        let stream = attacker.next_stream();
        let mut frames = frame(HEADERS, END_HEADERS, stream, &headers);
        frames.extend(data(stream, 0, &items, END_STREAM));
        frames
    };
    let no_room = [0, 4, 0, 0, 0, 0];
    flood(Duration::from_millis(100), &no_room, next).await;
}

/// Begins a watch of health with the first 16 kB of a message of 4 MiB every 10 ms, up to 1,000 at a time.
pub(crate) async fn watches_unfinished() {
    let headers = headers_of("/grpc.health.v1.Health/Watch", &[]);
    let mut message = vec![0, 0, 0x40, 0, 0];
    message.resize(16 << 10, 0);
    let next = |attacker: &mut Attacker| {
        if attacker.stream >= 2_000 {
            return Vec::new();
        }
        let stream = attacker.next_stream();
        let mut frames = frame(HEADERS, END_HEADERS, stream, &headers);
        frames.extend(frame(DATA, 0, stream, &message));
        frames
    };
    flood(Duration::from_millis(10), &[], next).await;
}

/// Asks a batch of 700,000 empty items, packed into a few kilobytes, every 20 ms.
pub(crate) async fn packed_batches() {
    let headers = headers_of(BATCH, &[("grpc-encoding", "gzip")]);
    let mut packer = GzEncoder::new(Vec::new(), Compression::best());
    // Into memory nothing fails.
    let packed = packer
        .write_all(&[10, 0].repeat(700_000))
        .and_then(|()| packer.finish());
    let items = packed.unwrap_or_default();
    let next = |attacker: &mut Attacker| {
        let stream = attacker.next_stream();
        let mut frames = frame(HEADERS, END_HEADERS, stream, &headers);
        frames.extend(data(stream, 1, &items, END_STREAM));
        frames
    };
    flood(Duration::from_millis(20), &[], next).await;
}

/// Connects and says nothing; again when it is thrown out.
pub(crate) async fn half_open() {
    loop {
        if let Ok(mut connection) = connect().await {
            // Until the service closes it.
            drop(copy(&mut connection, &mut sink()).await);
        }
        sleep(RECONNECT).await;
    }
}
