//! What systemd hears of the service, at a socket like its own.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    net::UnixDatagram,
    process::{Child, Command},
};

use crate::{
    commands::{command, finish},
    database::{Database, as_role},
    names::id,
    proxy::{Proxy, Way},
    server::{APPROVE, fill, within},
    support::{HALLPASS, temporary_directory},
};

const PATIENCE: Duration = Duration::from_secs(60);

const ALIVE: &str = "WATCHDOG=1\n";
const READY: &str = "READY=1\n";
const STOPPING: &str = "STOPPING=1\n";

/// Systemd's end.
struct Systemd {
    socket: UnixDatagram,
}

impl Systemd {
    fn start(directory: &Path) -> Self {
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        // As root's tests run it, a private database has another account, and is heard if it speaks.
        for (path, mode) in [(directory, 0o755), (path.as_path(), 0o777)] {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        Self { socket }
    }

    /// `hallpass serve`, as systemd starts it.
    fn serve(&self, directory: &Path) -> Command {
        let mut service = command(HALLPASS);
        let socket = directory.join("socket");
        service
            .arg("serve")
            .env("NOTIFY_SOCKET", directory.join("notify"))
            .env("HALLPASS_GRPC_LISTEN", format!("unix:{}", socket.display()))
            .env("HALLPASS_DATA_DIR", directory.join("data"))
            .env("HALLPASS_LAME_DUCK", "10ms")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        service
    }

    async fn hear(&self) -> String {
        let mut datagram = [0; 1024];
        let heard = self.socket.recv(&mut datagram);
        let length = within("systemd hears of the service", PATIENCE, heard).await;
        String::from_utf8(datagram[..length.unwrap()].to_vec()).unwrap()
    }

    /// What is said besides signs of life.
    async fn hear_news(&self) -> String {
        loop {
            let heard = self.hear().await;
            if heard != ALIVE {
                return heard;
            }
        }
    }

    /// What was said that nobody has listened to yet.
    fn left(&self) -> Vec<String> {
        let mut datagram = [0; 1024];
        std::iter::from_fn(|| {
            self.socket
                .try_recv(&mut datagram)
                .ok()
                .map(|length| String::from_utf8_lossy(&datagram[..length]).into_owned())
        })
        .collect()
    }
}

async fn stop(mut service: Child) {
    let pid = Pid::from_raw(service.id().unwrap().cast_signed()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let ended = within("the service ends", PATIENCE, service.wait()).await;
    assert_eq!(ended.unwrap().code(), Some(0));
}

#[tokio::test]
async fn it_is_ready_once_it_answers_and_alive_before() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let proxy = Proxy::to(&database.url, Way::Closed);
    let directory = temporary_directory();
    let systemd = Systemd::start(directory.path());
    let mut service = systemd.serve(directory.path());
    let service = service
        .args(["--database-url", &as_role(&proxy.url, "hallpass_service")])
        .env("WATCHDOG_USEC", "300000")
        .spawn()
        .unwrap();
    // Six are longer than systemd would have waited for one.
    for _ in 0..6 {
        assert_eq!(systemd.hear().await, ALIVE, "the database is away");
    }
    proxy.set(Way::Open);
    assert_eq!(systemd.hear_news().await, READY);
    let mut check = command(HALLPASS);
    let endpoint = format!("unix:{}", directory.path().join("socket").display());
    check.args(["check", "--endpoint", &endpoint]);
    check.args([&id("lincoln").to_string(), &id("bob").to_string(), APPROVE]);
    assert_eq!(finish(check).await.code, 0);
    assert_eq!(systemd.hear().await, ALIVE);
    stop(service).await;
    assert_eq!(systemd.hear_news().await, STOPPING);
    assert!(systemd.left().iter().all(|heard| heard == ALIVE));
}

/// PostgreSQL tells systemd of itself, too, where it was built to.
#[tokio::test]
async fn its_private_database_does_not_speak_for_it() {
    let directory = temporary_directory();
    let systemd = Systemd::start(directory.path());
    let mut service = systemd.serve(directory.path());
    // Another process's watchdog is none of ours.
    let service = service
        .env("WATCHDOG_USEC", "300000")
        .env("WATCHDOG_PID", "1")
        .spawn()
        .unwrap();
    assert_eq!(systemd.hear().await, READY);
    stop(service).await;
    assert_eq!(systemd.left(), [STOPPING]);
}
