//! A connection that is ready for HTTP: plain or TLS over TCP, or a Unix socket; who is at its other end; its slot.
//!
//! Invariant: its first bytes have come, so its reader waits for nobody who never meant to speak. It fails when it is
//! too old, whatever its reader waits for. Its slot is free again when it is dropped.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;

use super::{connections::Connections, slots::Slot};
use crate::auth::Peer;

/// The preface of HTTP/2, which a client sends without being asked. A request of HTTP/1.1 is longer, for it names its
/// host.
const FIRST_BYTES: usize = 24;

/// A connection, its other end known and its handshake done.
pub struct Io {
    transport: Transport,
    peer: Peer,
    first_bytes: [u8; FIRST_BYTES],
    /// How many of them have been read.
    first_bytes_read: usize,
    /// When it is too old.
    end: Option<Pin<Box<Sleep>>>,
    _slot: Slot,
}

/// What carries the bytes.
pub(super) enum Transport {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

impl Io {
    /// Waits for the first bytes.
    ///
    /// # Errors
    /// When the connection ends before.
    pub(super) async fn begin(
        transport: Transport,
        peer: Peer,
        slot: Slot,
        connections: &Connections,
    ) -> io::Result<Self> {
        let end = connections
            .age_max
            .map(|age_max| Box::pin(sleep(age_max + connections.age_grace)));
        let mut io = Self {
            transport,
            peer,
            first_bytes: [0; FIRST_BYTES],
            first_bytes_read: FIRST_BYTES,
            end,
            _slot: slot,
        };
        let mut first_bytes = [0; FIRST_BYTES];
        io.read_exact(&mut first_bytes).await?;
        io.first_bytes = first_bytes;
        io.first_bytes_read = 0;
        Ok(io)
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// What an operation comes to: one that has to wait fails when the connection is too old.
    fn or_too_old<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let Some(end) = self.end.as_mut().filter(|_| polled.is_pending()) else {
            return polled;
        };
        ready!(end.as_mut().poll(context));
        let error = io::Error::new(io::ErrorKind::TimedOut, "the connection is too old");
        Poll::Ready(Err(error))
    }
}

/// Calls a method of whatever carries the bytes.
macro_rules! on_transport {
    ($io:expr, $transport:ident => $call:expr) => {
        match &mut $io.transport {
            Transport::Tcp(stream) => {
                let $transport = Pin::new(stream);
                $call
            }
            Transport::Tls(stream) => {
                let $transport = Pin::new(stream.as_mut());
                $call
            }
            Transport::Unix(stream) => {
                let $transport = Pin::new(stream);
                $call
            }
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first_bytes_read < FIRST_BYTES {
            let end = FIRST_BYTES.min(self.first_bytes_read + buffer.remaining());
            buffer.put_slice(&self.first_bytes[self.first_bytes_read..end]);
            self.first_bytes_read = end;
            return Poll::Ready(Ok(()));
        }
        let polled = on_transport!(self, stream => stream.poll_read(context, buffer));
        self.or_too_old(context, polled)
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = on_transport!(self, stream => stream.poll_write(context, bytes));
        self.or_too_old(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = on_transport!(self, stream => stream.poll_write_vectored(context, slices));
        self.or_too_old(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Tcp(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
            Transport::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = on_transport!(self, stream => stream.poll_flush(context));
        self.or_too_old(context, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = on_transport!(self, stream => stream.poll_shutdown(context));
        self.or_too_old(context, polled)
    }
}
