//! What carries the bytes of the load: TCP, TLS over it, or a Unix socket; none of them blocks.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::Arc,
};

use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};

/// What is loaded.
#[derive(Clone, Debug)]
pub enum Target {
    /// `HOST:PORT`.
    Tcp(String),
    /// `HOST:PORT`, and whom to believe there.
    Tls(String, Arc<ClientConfig>),
    Unix(PathBuf),
}

impl Target {
    /// As requests name it.
    pub(super) fn authority(&self) -> &str {
        match self {
            Self::Tcp(address) | Self::Tls(address, _) => address,
            Self::Unix(_) => "localhost",
        }
    }

    pub(super) fn scheme_is_https(&self) -> bool {
        matches!(self, Self::Tls(..))
    }
}

pub(super) enum Transport {
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
    Unix(UnixStream),
}

impl Transport {
    pub(super) fn open(target: &Target) -> io::Result<Self> {
        match target {
            Target::Tcp(address) => {
                let stream = connect(address)?;
                stream.set_nonblocking(true)?;
                Ok(Self::Tcp(stream))
            }
            Target::Tls(address, config) => {
                let host = address
                    .rsplit_once(':')
                    .map_or(&**address, |(host, _)| host);
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
                let name = name.map_err(io::Error::other)?;
                let client = ClientConnection::new(Arc::clone(config), name);
                let mut client = client.map_err(io::Error::other)?;
                let mut stream = connect(address)?;
                while client.is_handshaking() {
                    client.complete_io(&mut stream)?;
                }
                stream.set_nonblocking(true)?;
                Ok(Self::Tls(Box::new(StreamOwned::new(client, stream))))
            }
            Target::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_nonblocking(true)?;
                Ok(Self::Unix(stream))
            }
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.sock.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }

    /// How many bytes have come; `None`: none yet.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        or_later(match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        })
    }

    /// How many bytes have been taken; `None`: none yet.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        or_later(match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        })
    }

    /// Sends what TLS has taken and the socket has not.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if let Self::Tls(stream) = self {
            or_later(stream.flush())?;
        }
        Ok(())
    }

    /// Whether there is anything to flush.
    pub(super) fn wants_write(&self) -> bool {
        matches!(self, Self::Tls(stream) if stream.conn.wants_write())
    }
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn or_later<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
