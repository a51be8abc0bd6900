//! A way to the test's cluster that can be closed, and that can fall silent as a network does.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

use crate::support::temporary_directory;

/// The socket's name in its directory, as libpq has it for the cluster's port.
const SOCKET: &str = ".s.PGSQL.5432";

/// How the way is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Open,
    /// Connections are made and kept, and nothing comes through.
    Silent,
    /// What is asked comes through, and no answer.
    Deaf,
    /// Connections that are made meanwhile lose every notification, and nothing else.
    Unnotified,
    /// Nobody listens, and every connection has ended.
    Closed,
}

/// Ends with its runtime.
pub(crate) struct Proxy {
    pub(crate) url: String,
    way: watch::Sender<Way>,
    /// Connections made before the last of these never say anything again.
    deafened: watch::Sender<u64>,
    _directory: TempDir,
}

impl Proxy {
    /// A way to the database that `url` names.
    pub(crate) fn to(url: &str, way: Way) -> Self {
        let (before, host_on) = url.split_once("host=").unwrap();
        let (host, after) = host_on.split_once('&').unwrap();
        let directory = temporary_directory();
        let path = directory.path().to_str().unwrap();
        let url = format!("{before}host={path}&{after}");
        let (way, state) = watch::channel(way);
        let target = Path::new(host).join(SOCKET);
        let (deafened, deaf) = watch::channel(0);
        tokio::spawn(listen(directory.path().join(SOCKET), target, state, deaf));
        Self {
            url,
            way,
            deafened,
            _directory: directory,
        }
    }

    pub(crate) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Every connection that is there falls silent for good, as when a router forgets them; new ones work.
    pub(crate) fn deafen(&self) {
        self.deafened.send_modify(|count| *count += 1);
    }
}

async fn listen(
    path: PathBuf,
    target: PathBuf,
    way: watch::Receiver<Way>,
    deaf: watch::Receiver<u64>,
) {
    let mut changes = way.clone();
    // Until the test ends, and the sender with it.
    while changes.wait_for(|way| *way != Way::Closed).await.is_ok() {
        // Its directory is gone where the proxy is.
        let Ok(listener) = UnixListener::bind(&path) else {
            return;
        };
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                _closed_or_over = changes.wait_for(|way| *way == Way::Closed) => break,
                accepted = listener.accept() => {
                    let (near, _) = accepted.unwrap();
                    connections.spawn(connect(near, target.clone(), way.clone(), deaf.clone()));
                }
            }
        }
        drop(std::fs::remove_file(&path));
    }
}

async fn connect(
    near: UnixStream,
    target: PathBuf,
    way: watch::Receiver<Way>,
    mut deaf: watch::Receiver<u64>,
) {
    deaf.mark_unchanged();
    let Ok(far) = UnixStream::connect(target).await else {
        return;
    };
    let unnotified = *way.borrow() == Way::Unnotified;
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    // When one direction ends, so does the connection.
    tokio::select! {
        () = pass_on(near_read, far_write, way.clone(), deaf.clone(), &[Way::Silent], None) => {}
        () = pass_on(far_read, near_write, way, deaf, &[Way::Silent, Way::Deaf], unnotified.then(Vec::new)) => {}
    }
}

/// What is on its way when the way falls silent arrives when it opens, as a network repeats it. `messages`: what has come
/// of the next one, where notifications are to be left out.
async fn pass_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
    deaf: watch::Receiver<u64>,
    silent: &[Way],
    mut messages: Option<Vec<u8>>,
) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else {
            return;
        };
        if deaf.has_changed().unwrap_or(true) {
            std::future::pending().await
        }
        if way.wait_for(|way| !silent.contains(way)).await.is_err() {
            return;
        }
        let passed = match &mut messages {
            Some(partial) => {
                partial.extend(&buffer[..count]);
                to.write_all(&without_notifications(partial)).await
            }
            None => to.write_all(&buffer[..count]).await,
        };
        if passed.is_err() {
            return;
        }
    }
}

/// Takes the whole messages out of what a server has sent: a byte that says what it is, and the length of the rest.
fn without_notifications(sent: &mut Vec<u8>) -> Vec<u8> {
    let mut passed = Vec::new();
    while let Some(length) = sent.get(1..5) {
        let length = u32::from_be_bytes(length.try_into().unwrap());
        let end = 1 + usize::try_from(length).unwrap();
        if sent.len() < end {
            break;
        }
        let message: Vec<u8> = sent.drain(..end).collect();
        if message[0] != b'A' {
            passed.extend(message);
        }
    }
    passed
}
