//! One connection of HTTP/2, by hand: what a gRPC client sends, and as much of the answers as tells how a call ended.
//!
//! Header fields that do not vary are sent once and named by their index afterwards, as clients do; a credential is sent
//! each time, as clients do that hold it to be sensitive.

use std::{collections::VecDeque, io, os::fd::BorrowedFd, time::Instant};

use super::{
    Questions,
    transport::{Target, Transport},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

const HEAD_BYTES: usize = 9;

/// The largest frame that every peer takes.
const FRAME_BYTES_MAX: usize = 16 << 10;

/// What a peer takes of all calls before it has said more.
const WINDOW_BYTES: i64 = 65_535;

/// What we take of a call, and of all calls, before the peer has to wait: more than it ever sends.
const OWN_WINDOW_BYTES: u32 = 1 << 30;

/// One answer in so many is kept.
const SAMPLE_EVERY: u32 = 512;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Answered,
    /// By a status without a message.
    Refused,
    Reset,
}

/// The header fields of every call.
#[derive(Clone, Debug)]
pub struct Request {
    /// HPACK, to be sent first: adds fields to the table.
    first: Vec<u8>,
    /// HPACK, from then on.
    next: Vec<u8>,
}

impl Request {
    #[must_use]
    pub(super) fn new(target: &Target, questions: &Questions) -> Self {
        const POST: u8 = 0x83;
        const HTTP: u8 = 0x86;
        const HTTPS: u8 = 0x87;
        // The static table ends with 61; fields are counted from the last one added.
        const ADDED_FROM: u8 = 62;
        let scheme = if target.scheme_is_https() {
            HTTPS
        } else {
            HTTP
        };
        let (mut first, mut next) = (vec![POST, scheme], vec![POST, scheme]);
        let fields = [
            (":path", questions.path),
            (":authority", target.authority()),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("user-agent", "hallpass-bench"),
        ];
        let mut added: Vec<u8> = (ADDED_FROM..).take(fields.len()).collect();
        added.reverse();
        next.extend(added.iter().map(|index| 0x80 | index));
        for (name, value) in fields {
            first.push(0x40);
            text(&mut first, name);
            text(&mut first, value);
        }
        if let Some(token) = &questions.token {
            for block in [&mut first, &mut next] {
                // Never to be put into a table.
                block.push(0x10);
                text(block, "authorization");
                text(block, &format!("Bearer {token}"));
            }
        }
        Self { first, next }
    }
}

/// A string, as it is.
fn text(block: &mut Vec<u8>, text: &str) {
    const SHORT_MAX: usize = 127;
    match text.len().checked_sub(SHORT_MAX) {
        None => block.push(u8::try_from(text.len()).unwrap_or(0)),
        Some(mut rest) => {
            block.push(127);
            while rest >= 128 {
                block.push(0x80 | u8::try_from(rest % 128).unwrap_or(0));
                rest /= 128;
            }
            block.push(u8::try_from(rest).unwrap_or(0));
        }
    }
    block.extend_from_slice(text.as_bytes());
}

struct Call {
    due: Instant,
    has_answer: bool,
    has_ended: bool,
}

pub(super) struct Connection {
    transport: Transport,
    request: Request,
    out: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    filled: usize,
    /// Those that have begun, from the oldest that has not ended.
    calls: VecDeque<Call>,
    /// The stream of the first of them.
    oldest: u32,
    under_way: usize,
    /// What the peer still takes of all calls.
    window: i64,
    /// Messages that wait for it, with when they were due.
    waiting: VecDeque<(Vec<u8>, Instant)>,
    /// Taken since the peer was last told.
    taken: u32,
}

impl Connection {
    pub(super) fn open(target: &Target, request: Request) -> io::Result<Self> {
        let mut out = PREFACE.to_vec();
        let window = OWN_WINDOW_BYTES.to_be_bytes();
        const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];
        frame(
            &mut out,
            SETTINGS,
            0,
            0,
            &[INITIAL_WINDOW_SIZE.as_slice(), &window].concat(),
        );
        frame(&mut out, WINDOW_UPDATE, 0, 0, &window);
        Ok(Self {
            transport: Transport::open(target)?,
            request,
            out,
            sent: 0,
            received: vec![0; 256 << 10],
            filled: 0,
            calls: VecDeque::new(),
            oldest: 1,
            under_way: 0,
            window: WINDOW_BYTES,
            waiting: VecDeque::new(),
            taken: 0,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.transport.fd()
    }

    /// Calls that have no end yet.
    pub(super) fn under_way(&self) -> usize {
        self.under_way + self.waiting.len()
    }

    pub(super) fn has_more_to_send(&self) -> bool {
        self.sent < self.out.len() || self.transport.wants_write()
    }

    /// A call that is due then.
    pub(super) fn ask(&mut self, message: &[u8], due: Instant) {
        if self.waiting.is_empty() && self.window >= grpc_len(message) {
            self.begin(message, due);
        } else {
            self.waiting.push_back((message.to_vec(), due));
        }
    }

    fn begin(&mut self, message: &[u8], due: Instant) {
        let stream = self.oldest + 2 * u32::try_from(self.calls.len()).unwrap_or(0);
        let fields = if stream == 1 {
            &self.request.first
        } else {
            &self.request.next
        };
        frame(&mut self.out, HEADERS, END_HEADERS, stream, fields);
        let length = u32::try_from(message.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes();
        let [a, b, c, d] = length;
        let head = [0, a, b, c, d];
        let first = message.len().min(FRAME_BYTES_MAX - head.len());
        let (now, mut rest) = message.split_at(first);
        let end = |rest: &[u8]| if rest.is_empty() { END_STREAM } else { 0 };
        frame_of(&mut self.out, DATA, end(rest), stream, &[&head, now]);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(FRAME_BYTES_MAX));
            rest = later;
            frame(&mut self.out, DATA, end(rest), stream, now);
        }
        self.window -= grpc_len(message);
        self.under_way += 1;
        self.calls.push_back(Call {
            due,
            has_answer: false,
            has_ended: false,
        });
    }

    pub(super) fn send(&mut self) -> io::Result<()> {
        while self.sent < self.out.len() {
            match self.transport.write(&self.out[self.sent..])? {
                Some(written) => self.sent += written,
                None => return Ok(()),
            }
        }
        self.out.clear();
        self.sent = 0;
        self.transport.flush()
    }

    /// Takes what has come, and tells of each call that has ended.
    pub(super) fn receive(
        &mut self,
        mut tell: impl FnMut(Ended, Instant, Option<Vec<u8>>),
    ) -> io::Result<()> {
        loop {
            let room = self.received.len() - self.filled;
            match self.transport.read(&mut self.received[self.filled..])? {
                None => return Ok(()),
                Some(0) => return Err(io::Error::other("the service closed a connection")),
                Some(count) => {
                    self.filled += count;
                    let received = std::mem::take(&mut self.received);
                    let read = self.read_frames(&received[..self.filled], &mut tell);
                    self.received = received;
                    let read = read?;
                    self.received.copy_within(read..self.filled, 0);
                    self.filled -= read;
                    if count < room {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Returns how many bytes of it were whole frames.
    fn read_frames(
        &mut self,
        received: &[u8],
        tell: &mut impl FnMut(Ended, Instant, Option<Vec<u8>>),
    ) -> io::Result<usize> {
        let mut at = 0;
        let mut sample = None;
        while let Some(&[a, b, c, kind, flags, d, e, f, g]) =
            received[at..].first_chunk::<HEAD_BYTES>()
        {
            let length = u32::from_be_bytes([0, a, b, c]);
            let end = at + HEAD_BYTES + usize::try_from(length).unwrap_or(usize::MAX);
            let Some(payload) = received.get(at + HEAD_BYTES..end) else {
                break;
            };
            at = end;
            let stream = u32::from_be_bytes([d, e, f, g]);
            match kind {
                DATA => {
                    self.taken += length;
                    if stream / 2 % SAMPLE_EVERY == 0 && !payload.is_empty() {
                        sample = Some(payload.get(5..).unwrap_or_default().to_vec());
                    }
                }
                HEADERS => {
                    let ends = flags & END_STREAM != 0;
                    if let Some((how, due)) = self.headers(stream, ends) {
                        tell(how, due, sample.take());
                    }
                }
                RST_STREAM => {
                    if let Some((_, due)) = self.end(stream) {
                        tell(Ended::Reset, due, None);
                    }
                }
                SETTINGS if flags & ACK == 0 => frame(&mut self.out, SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => frame(&mut self.out, PING, ACK, 0, payload),
                GOAWAY => return Err(io::Error::other("the service ends a connection")),
                WINDOW_UPDATE if stream == 0 => {
                    let more = payload
                        .first_chunk()
                        .map_or(0, |more| u32::from_be_bytes(*more));
                    self.window += i64::from(more);
                    self.begin_waiting();
                }
                _ => {}
            }
        }
        if self.taken > OWN_WINDOW_BYTES / 2 {
            frame(
                &mut self.out,
                WINDOW_UPDATE,
                0,
                0,
                &self.taken.to_be_bytes(),
            );
            self.taken = 0;
        }
        Ok(at)
    }

    fn begin_waiting(&mut self) {
        while let Some((message, due)) = self.waiting.pop_front() {
            if self.window < grpc_len(&message) {
                self.waiting.push_front((message, due));
                return;
            }
            self.begin(&message, due);
        }
    }

    fn headers(&mut self, stream: u32, ends: bool) -> Option<(Ended, Instant)> {
        if !ends {
            self.call(stream)?.has_answer = true;
            return None;
        }
        let (has_answer, due) = self.end(stream)?;
        let how = if has_answer {
            Ended::Answered
        } else {
            Ended::Refused
        };
        Some((how, due))
    }

    fn call(&mut self, stream: u32) -> Option<&mut Call> {
        let index = usize::try_from(stream.checked_sub(self.oldest)? / 2).ok()?;
        self.calls.get_mut(index)
    }

    /// Whether the call had been answered, and when it was due; `None` where it has ended before.
    fn end(&mut self, stream: u32) -> Option<(bool, Instant)> {
        let call = self.call(stream).filter(|call| !call.has_ended)?;
        call.has_ended = true;
        let ended = (call.has_answer, call.due);
        self.under_way -= 1;
        while self.calls.front().is_some_and(|call| call.has_ended) {
            self.calls.pop_front();
            self.oldest += 2;
        }
        Some(ended)
    }
}

/// With gRPC's head.
fn grpc_len(message: &[u8]) -> i64 {
    i64::try_from(message.len() + 5).unwrap_or(i64::MAX)
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    frame_of(out, kind, flags, stream, &[payload]);
}

fn frame_of(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let length = u32::try_from(length).unwrap_or(0).to_be_bytes();
    out.extend_from_slice(&length[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}
