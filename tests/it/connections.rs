//! What a connection may take, and for how long; and that nobody who takes more keeps others out.

use std::{net::SocketAddr, time::Duration};

use hallpass::server::{Config, Connections, connections::OPS_CONNECTIONS_MAX};
use hallpass_client::tonic::Code;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    database::{Database, eventually},
    pki::{Authority, Files, Validity},
    server::{Server, config, connections, within},
    web::Web,
};

/// How a client of HTTP/2 begins.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// An empty SETTINGS frame.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

/// The first HEADERS frame of a stream, without the end of its headers: more are to come.
const HEADERS_WITHOUT_END: [u8; 9] = [0, 0, 0, 1, 0, 0, 0, 0, 1];

const PING: [u8; 17] = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

const LONG: Duration = Duration::from_secs(600);

/// For what a test waits to see cut off: honest clients on a machine that is busy need less.
const SHORT: Duration = Duration::from_secs(1);

/// What no connection here should take.
const PATIENCE: Duration = Duration::from_secs(20);

async fn serve(connections: Connections) -> Server {
    let database = Database::create().await;
    Server::start(Config {
        connections,
        ..config(&database.url)
    })
    .await
}

async fn connect_from(source: &str, server: &Server) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    let source: SocketAddr = format!("{source}:0").parse().unwrap();
    socket.bind(source).unwrap();
    socket.connect(server.address).await.unwrap()
}

/// A connection that has sent its first bytes, from this address of the machine's own.
async fn greet_from(source: &str, server: &Server) -> TcpStream {
    let mut stream = connect_from(source, server).await;
    // Whoever was closed at once learns of it when it reads.
    drop(stream.write_all(&[PREFACE, &SETTINGS].concat()).await);
    stream
}

async fn greet(server: &Server) -> TcpStream {
    greet_from("127.0.0.1", server).await
}

/// Whether the service speaks on the connection: it sends its settings first.
async fn is_served(stream: &mut TcpStream) -> bool {
    let read = within("settings or the end", PATIENCE, stream.read_u8()).await;
    read.is_ok()
}

/// Returns when the connection is closed.
async fn closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // The end or a reset.
    drop(
        within(
            "the connection is closed",
            PATIENCE,
            stream.read_to_end(&mut rest),
        )
        .await,
    );
}

#[tokio::test]
async fn connections_are_bounded_in_all_and_come_back() {
    // One is the test's own.
    let server = serve(Connections {
        connections_max: 3,
        ..connections()
    })
    .await;
    let mut first = greet(&server).await;
    assert!(is_served(&mut first).await);
    let mut second = greet_from("127.0.0.2", &server).await;
    assert!(is_served(&mut second).await);
    assert!(!is_served(&mut greet_from("127.0.0.3", &server).await).await);
    // Those that are there go on.
    server.health("").await;
    for _ in 0..3 {
        first.shutdown().await.unwrap();
        eventually("a connection that has ended makes room", async || {
            first = greet(&server).await;
            is_served(&mut first).await
        })
        .await;
        assert!(!is_served(&mut greet(&server).await).await);
    }
}

/// A flood, or clients that leave connections open, makes no probe fail; nor do operators keep callers out.
#[tokio::test]
async fn operators_have_connections_of_their_own() {
    // One is the test's own.
    let server = serve(Connections {
        connections_max: 2,
        ..connections()
    })
    .await;
    let mut idle = greet(&server).await;
    assert!(is_served(&mut idle).await);
    let mut refused = TcpStream::connect(server.http).await.unwrap();
    closed(&mut refused).await;
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(Web::at(server.ops).get(path).await.status, 200, "{path}");
    }

    drop(idle);
    let mut left_open = Vec::new();
    // Those of the client that has just asked may be open still.
    for _ in 0..OPS_CONNECTIONS_MAX {
        left_open.push(TcpStream::connect(server.ops).await.unwrap());
    }
    let mut refused = TcpStream::connect(server.ops).await.unwrap();
    closed(&mut refused).await;
    eventually("a caller is served", async || {
        is_served(&mut greet(&server).await).await
    })
    .await;
}

#[tokio::test]
async fn connections_are_bounded_for_each_address() {
    let server = serve(Connections {
        address_connections_max: 2,
        ..connections()
    })
    .await;
    for source in ["127.0.0.2", "127.0.0.3"] {
        let mut first = greet_from(source, &server).await;
        let mut second = greet_from(source, &server).await;
        assert!(is_served(&mut first).await && is_served(&mut second).await);
        assert!(!is_served(&mut greet_from(source, &server).await).await);
        drop(first);
        let mut third = second;
        eventually("a connection that has ended makes room", async || {
            third = greet_from(source, &server).await;
            is_served(&mut third).await
        })
        .await;
    }
}

#[tokio::test]
async fn whoever_does_not_speak_is_cut_off_and_gives_its_slot_back() {
    let authority = Authority::new();
    let files = Files::new(&authority.server(&["127.0.0.1"], Validity::Now), None);
    let database = Database::create().await;
    for tls in [None, Some(files.load().into())] {
        let config = Config {
            tls: tls.clone(),
            connections: Connections {
                connections_max: 3,
                handshake_timeout: SHORT,
                ..connections()
            },
            ..config(&database.url)
        };
        let server = match tls {
            None => Server::listening(config).await,
            Some(_) => Server::listening_tls(config, authority.believed()).await,
        };
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        // The beginning of a preface, or of a hello: what follows never comes.
        let mut slow = TcpStream::connect(server.address).await.unwrap();
        slow.write_all(if tls.is_none() { &PREFACE[..23] } else { &[22] })
            .await
            .unwrap();
        let mut refused = TcpStream::connect(server.address).await.unwrap();
        closed(&mut refused).await;
        closed(&mut silent).await;
        closed(&mut slow).await;
        eventually("there is room again", async || {
            if tls.is_none() {
                return is_served(&mut greet(&server).await).await;
            }
            let connected = hallpass_client::connect_tls(&server.endpoint, authority.believed());
            connected.await.is_ok()
        })
        .await;
    }
}

#[tokio::test]
async fn handshakes_that_are_begun_and_left_keep_nobody_out() {
    const HANDSHAKES_MAX: usize = 8;
    const LEFT: usize = 100;
    let authority = Authority::new();
    let files = Files::new(&authority.server(&["127.0.0.1"], Validity::Now), None);
    let database = Database::create().await;
    let config = Config {
        tls: Some(files.load().into()),
        connections: Connections {
            handshakes_max: HANDSHAKES_MAX,
            handshake_timeout: LONG,
            ..connections()
        },
        ..config(&database.url)
    };
    let server = Server::listening_tls(config, authority.believed()).await;
    let mut left = Vec::new();
    for _ in 0..LEFT {
        left.push(TcpStream::connect(server.address).await.unwrap());
    }
    for _ in 0..3 {
        let connected = hallpass_client::connect_tls(&server.endpoint, authority.believed());
        connected.await.unwrap();
    }
    // Those that have waited longest have made room.
    for stream in &mut left[..LEFT - HANDSHAKES_MAX] {
        closed(stream).await;
    }
}

#[tokio::test]
async fn who_begins_many_handshakes_gives_up_its_own() {
    const HANDSHAKES_MAX: usize = 8;
    let server = serve(Connections {
        handshakes_max: HANDSHAKES_MAX,
        handshake_timeout: LONG,
        ..connections()
    })
    .await;
    // Someone far away, whose first bytes are long on their way.
    let mut honest = connect_from("127.0.0.2", &server).await;
    let mut left = Vec::new();
    for _ in 0..10 * HANDSHAKES_MAX {
        left.push(connect_from("127.0.0.3", &server).await);
    }
    for stream in &mut left[..9 * HANDSHAKES_MAX] {
        closed(stream).await;
    }
    let first = [PREFACE, &SETTINGS].concat();
    honest.write_all(&first).await.unwrap();
    assert!(is_served(&mut honest).await);
}

#[tokio::test]
async fn headers_that_never_end_end_the_connection() {
    let server = serve(Connections {
        keepalive_interval: Duration::from_millis(100),
        keepalive_timeout: SHORT,
        ..connections()
    })
    .await;
    let mut stream = greet(&server).await;
    assert!(is_served(&mut stream).await);
    stream.write_all(&HEADERS_WITHOUT_END).await.unwrap();
    closed(&mut stream).await;
}

#[tokio::test]
async fn whoever_takes_nothing_is_cut_off() {
    let server = serve(Connections {
        connections_max: 2,
        keepalive_interval: Duration::from_millis(100),
        keepalive_timeout: SHORT,
        ..connections()
    })
    .await;
    // Asks until the answers, which it never reads, are stuck on their way.
    let mut deaf = greet(&server).await;
    assert!(is_served(&mut deaf).await);
    let pings = PING.repeat(1_000);
    while timeout(SHORT, deaf.write_all(&pings))
        .await
        .is_ok_and(|sent| sent.is_ok())
    {}
    eventually("its slot is free", async || {
        is_served(&mut greet(&server).await).await
    })
    .await;
}

#[tokio::test]
async fn an_old_connection_ends_its_streams_too() {
    let server = serve(Connections {
        age_max: Some(Duration::from_millis(100)),
        age_grace: SHORT,
        ..connections()
    })
    .await;
    let mut client = HealthClient::new(server.channel.clone());
    let watch = client.watch(HealthCheckRequest::default()).await;
    let mut statuses = watch.unwrap().into_inner();
    let ended = within("the stream ends", PATIENCE, async {
        loop {
            match statuses.message().await {
                Ok(Some(_)) => {}
                ended => break ended,
            }
        }
    });
    // Cut off, so that its client knows to go on elsewhere.
    let status = ended.await.unwrap_err();
    assert!(
        matches!(status.code(), Code::Unknown | Code::Unavailable),
        "{status:?}"
    );
}

#[tokio::test]
async fn what_is_under_way_on_an_old_connection_goes_on() {
    const GOAWAY: u8 = 7;
    let mut server = serve(Connections {
        age_max: Some(Duration::from_millis(100)),
        age_grace: LONG,
        ..connections()
    })
    .await;
    let mut client = HealthClient::new(server.channel.clone());
    let watch = client.watch(HealthCheckRequest::default()).await;
    let mut statuses = watch.unwrap().into_inner();
    let first = statuses.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);

    // A younger one is told to go elsewhere, and so the older one has been.
    let mut younger = greet(&server).await;
    within("a goodbye", PATIENCE, async {
        loop {
            let mut head = [0; 9];
            younger.read_exact(&mut head).await.unwrap();
            if head[3] == GOAWAY {
                break;
            }
            let mut payload = vec![0; usize::from(head[2])];
            younger.read_exact(&mut payload).await.unwrap();
        }
    })
    .await;
    server.begin_stop();
    let last = within(
        "the stream says that the service stops",
        PATIENCE,
        statuses.message(),
    );
    let last = last.await.unwrap().unwrap();
    assert_eq!(last.status(), ServingStatus::NotServing);
}
