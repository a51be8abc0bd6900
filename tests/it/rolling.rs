//! Replicas are restarted one after the other while a client that balances between them asks: no call is lost.

use std::{net::SocketAddr, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::Child,
};

use crate::{
    commands::{PATIENCE, command},
    database::{Database, as_role, eventually},
    examples::installed,
    names::id,
    server::{APPROVE, fill, within},
    support::HALLPASS,
    web::Web,
};

/// A `hallpass serve` at addresses that it has again when it is started again.
struct Replica {
    grpc: SocketAddr,
    ops: SocketAddr,
    url: String,
    child: Child,
}

impl Replica {
    async fn start(url: &str) -> Self {
        let (grpc, ops) = (free_address().await, free_address().await);
        let replica = Self {
            grpc,
            ops,
            url: url.to_owned(),
            child: serve(url, grpc, ops),
        };
        replica.ready().await;
        replica
    }

    async fn ready(&self) {
        eventually("the replica is ready", async || {
            let listens = tokio::net::TcpStream::connect(self.ops).await.is_ok();
            listens && Web::at(self.ops).get("/readyz").await.status == 200
        })
        .await;
    }

    async fn restart(&mut self) {
        let pid = Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        let ended = within("the replica stops", PATIENCE, self.child.wait()).await;
        assert!(ended.unwrap().success());
        self.child = serve(&self.url, self.grpc, self.ops);
        self.ready().await;
    }
}

async fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

fn serve(url: &str, grpc: SocketAddr, ops: SocketAddr) -> Child {
    let mut serve = command(HALLPASS);
    serve.args(["serve", "--database-url", url]);
    serve.args([
        "--grpc-listen",
        &grpc.to_string(),
        "--ops-listen",
        &ops.to_string(),
    ]);
    serve.stderr(Stdio::null()).spawn().unwrap()
}

#[tokio::test]
async fn a_rolling_restart_loses_no_call() {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let url = as_role(&database.url, "hallpass_service");
    let mut replicas = [Replica::start(&url).await, Replica::start(&url).await];
    let targets = format!("{},{}", replicas[0].grpc, replicas[1].grpc);
    let mut client = command(&installed("target/python/bin/python"));
    client.env(
        "PYTHONPATH",
        installed("target/python/installed").replace("/installed", ""),
    );
    client.args(["-B", &installed("tests/it/rolling.py"), &targets]);
    client.args([
        id("lincoln").to_string(),
        id("ann").to_string(),
        APPROVE.to_owned(),
    ]);
    client.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = client.spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    let mut output = BufReader::new(client.stdout.take().unwrap()).lines();
    let mut asked = async || {
        input.write_all(b"\n").await.unwrap();
        let line = within("the client counts", PATIENCE, output.next_line()).await;
        line.unwrap().unwrap().parse::<u64>().unwrap()
    };
    while asked().await < 100 {}
    for index in [0, 1, 0] {
        let before = asked().await;
        replicas[index].restart().await;
        // The restarted one has its turn before the next goes.
        while asked().await < before + 500 {}
    }
    drop(input);
    let outcomes = within("the client ends", PATIENCE, output.next_line()).await;
    let outcomes = outcomes.unwrap().unwrap();
    assert!(
        outcomes.starts_with("{'allow': ") && !outcomes.contains(','),
        "{outcomes}"
    );
}
