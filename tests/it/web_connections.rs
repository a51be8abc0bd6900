//! Connections of HTTP/1.1 whose clients do not do what is expected of them; and TLS.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hallpass::{
    limits::Bounds,
    server::{
        Config, Connections, Tls,
        tls::{HTTP1, HTTP2},
    },
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    connections::PREFACE,
    database::Database,
    pki::{Authority, Files, Validity},
    server::{Server, bounds, config, connections, within},
};

/// For what a test waits to see cut off.
const SHORT: Duration = Duration::from_millis(300);

/// What no connection here should take.
const PATIENCE: Duration = Duration::from_secs(20);

const HEALTH: &str = "GET /api/health HTTP/1.1\r\nhost: localhost\r\n\r\n";

async fn serve(connections: Connections, bounds: Bounds) -> Server {
    let database = Database::create().await;
    Server::start(Config {
        connections,
        bounds,
        ..config(&database.url)
    })
    .await
}

/// Whatever comes until the connection is closed.
async fn until_closed(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut read = Vec::new();
    // The end or a reset.
    drop(
        within(
            "the connection is closed",
            PATIENCE,
            stream.read_to_end(&mut read),
        )
        .await,
    );
    String::from_utf8_lossy(&read).into_owned()
}

async fn said(stream: &mut TcpStream, text: &str) -> String {
    stream.write_all(text.as_bytes()).await.unwrap();
    until_closed(stream).await
}

#[tokio::test]
async fn headers_that_never_end_and_idle_connections_do() {
    let server = serve(
        Connections {
            idle_max: SHORT,
            ..connections()
        },
        bounds(),
    )
    .await;
    let mut slow = TcpStream::connect(server.http).await.unwrap();
    let answer = said(
        &mut slow,
        "GET /api/health HTTP/1.1\r\nhost: localhost\r\nx-",
    )
    .await;
    assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut idle = TcpStream::connect(server.http).await.unwrap();
    let answer = said(&mut idle, HEALTH).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn a_body_that_never_ends_does() {
    let server = serve(
        connections(),
        Bounds {
            request_deadline_max: Some(SHORT),
            ..bounds()
        },
    )
    .await;
    for length in ["content-length: 1000", "transfer-encoding: chunked"] {
        let mut slow = TcpStream::connect(server.http).await.unwrap();
        let request = format!(
            "POST /v1/check HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{length}\r\n\r\n1\r\n{{"
        );
        let answer = said(&mut slow, &request).await;
        assert!(answer.starts_with("HTTP/1.1 504"), "{length}: {answer}");
        assert!(answer.contains("DEADLINE_EXCEEDED"), "{length}: {answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn headers_are_bounded() {
    let server = serve(connections(), bounds()).await;
    for (bytes, expected) in [(8 << 10, "HTTP/1.1 200"), (32 << 10, "HTTP/1.1 431")] {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        let request = format!(
            "GET /api/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-long: {}\r\n\r\n",
            "x".repeat(bytes)
        );
        let answer = said(&mut stream, &request).await;
        assert!(answer.starts_with(expected), "{bytes}: {answer}");
    }
    server.stop().await;
}

/// They are answered in their order; and whoever takes no answers is cut off when the connection is too old.
#[tokio::test]
async fn requests_that_do_not_wait_for_answers_are_bounded() {
    const REQUESTS: usize = 200;
    let server = serve(
        Connections {
            age_max: Some(Duration::from_secs(2)),
            age_grace: SHORT,
            ..connections()
        },
        bounds(),
    )
    .await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let last = HEALTH.replace("host:", "connection: close\r\nhost:");
    let answers = said(&mut stream, &(HEALTH.repeat(REQUESTS - 1) + &last)).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), REQUESTS);

    let mut flood = TcpStream::connect(server.http).await.unwrap();
    let requests = HEALTH.repeat(1_000);
    let flooded = async { while flood.write_all(requests.as_bytes()).await.is_ok() {} };
    within("the flood is cut off", PATIENCE, flooded).await;
    server.stop().await;
}

#[tokio::test]
async fn a_connection_that_is_old_takes_no_calls() {
    let server = serve(
        Connections {
            age_max: Some(SHORT),
            ..connections()
        },
        bounds(),
    )
    .await;
    let mut idle = TcpStream::connect(server.http).await.unwrap();
    let answer = said(&mut idle, HEALTH).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.stop().await;
}

async fn with_tls(
    address: SocketAddr,
    authority: &Authority,
    protocols: &[&[u8]],
) -> (Option<Vec<u8>>, TlsStream<TcpStream>) {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap();
    roots.add(ca).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector.connect(name, stream).await.unwrap();
    let spoken = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
    (spoken, stream)
}

#[tokio::test]
async fn with_tls_either_http_is_spoken() {
    let authority = Authority::new();
    let files = Files::new(&authority.server(&["127.0.0.1"], Validity::Now), None);
    let tls = Tls::load(
        files.paths.clone(),
        &[HTTP2, HTTP1],
        Duration::from_secs(60),
    );
    let database = Database::create().await;
    let server = Server::start(Config {
        http_tls: Some(Arc::new(tls.unwrap())),
        ..config(&database.url)
    })
    .await;
    let closing = HEALTH.replace("host:", "connection: close\r\nhost:");
    for offered in [&[HTTP1][..], &[]] {
        let (spoken, mut stream) = with_tls(server.http, &authority, offered).await;
        assert_eq!(spoken.as_deref(), offered.first().copied());
        stream.write_all(closing.as_bytes()).await.unwrap();
        let answer = until_closed(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let only_with_tls = "strict-transport-security: max-age=31536000";
        assert!(answer.contains(only_with_tls), "{answer}");
    }
    let (spoken, mut stream) = with_tls(server.http, &authority, &[HTTP1, HTTP2]).await;
    assert_eq!(spoken.as_deref(), Some(HTTP2));
    stream.write_all(PREFACE).await.unwrap();
    stream
        .write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0])
        .await
        .unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "the service's settings");
    // In the clear, nobody answers.
    let mut plain = TcpStream::connect(server.http).await.unwrap();
    let answer = said(&mut plain, &closing).await;
    assert!(!answer.contains("HTTP/1.1"), "{answer}");
    server.stop().await;
}
