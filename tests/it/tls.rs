//! TLS as callers meet it: who is believed on either side, and certificates that change while the service runs.

use std::{
    net::SocketAddr,
    path::Path,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use hallpass::server::{Config, Listener, Tls, accept::Acceptor, slots::Slots, tls::HTTP2};
use hallpass_client::{ClientTls, tonic::transport::Channel};
use rustls::{
    ALL_VERSIONS, ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    commands::hallpass,
    connections::PREFACE,
    database::{Database, eventually},
    names::id,
    pki::{Authority, Files, Issued, Validity},
    server::{APPROVE, Server, config, connections, fill, question, within},
};

const LOOPBACK: &str = "127.0.0.1";

/// What no connection here should take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The fixed part of a TLS record with a fatal alert, and the one that says that the version is not spoken.
const ALERT: u8 = 21;
const PROTOCOL_VERSION: [u8; 2] = [2, 70];

async fn serve(tls: Tls, believed: ClientTls) -> Server {
    let database = Database::create().await;
    fill(&database.client().await).await;
    let config = Config {
        tls: Some(Arc::new(tls)),
        ..config(&database.url)
    };
    let mut server = Server::listening_tls(config, believed).await;
    server.ready().await;
    server
}

/// Whether a caller that connects anew is answered, or why not.
async fn call(endpoint: &str, tls: ClientTls) -> Result<(), String> {
    let connected = async {
        let channel = hallpass_client::connect_tls(endpoint, tls).await;
        let channel = channel.map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        ask(channel).await
    };
    within("a call on a connection of its own", PATIENCE, connected).await
}

async fn ask(channel: Channel) -> Result<(), String> {
    let mut client = HealthClient::new(channel);
    let answer = client.check(HealthCheckRequest::default()).await;
    answer.map(drop).map_err(|status| format!("{status:?}"))
}

/// A client that says what the handshake came to.
async fn shake_hands(
    address: SocketAddr,
    config: ClientConfig,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(LOOPBACK).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

fn client(authority: &Authority, identity: Option<&Issued>) -> ClientConfig {
    client_of(authority, identity, ALL_VERSIONS)
}

fn client_of(
    authority: &Authority,
    identity: Option<&Issued>,
    versions: &[&'static SupportedProtocolVersion],
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap();
    roots.add(ca).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some(issued) => config
            .with_client_auth_cert(
                vec![issued.der.clone().into()],
                PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config
}

/// The certificate that new connections are shown.
async fn shown(address: SocketAddr, authority: &Authority) -> Vec<u8> {
    let stream = shake_hands(address, client(authority, None)).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test]
async fn a_server_is_believed_for_its_authority_name_and_time() {
    let (ours, another) = (Authority::new(), Authority::new());
    let names = [LOOPBACK, "permissions.example"];
    let files = Files::new(&ours.server(&names, Validity::Now), None);
    let server = serve(files.load(), ours.believed()).await;
    let named = |name: &str| ClientTls {
        server_name: Some(name.to_owned()),
        ..ours.believed()
    };
    for (tls, refused) in [
        (ours.believed(), None),
        (named("permissions.example"), None),
        (named("elsewhere.example"), Some("NotValidForName")),
        (another.believed(), Some("UnknownIssuer")),
        // No authority of this machine's has issued it, if the machine trusts any.
        (ClientTls::default(), Some("")),
    ] {
        let called = call(&server.endpoint, tls).await;
        match refused {
            None => assert_eq!(called, Ok(())),
            Some(why) => {
                let error = called.unwrap_err().replace(' ', "").to_lowercase();
                assert!(error.contains(&why.to_lowercase()), "{why}: {error}");
            }
        }
    }

    for (validity, why) in [
        (Validity::Expired, "expired"),
        (Validity::NotYet, "notvalidyet"),
    ] {
        let issued = ours.server(&names, validity);
        files.swap(&issued.certificate, &issued.key, None);
        let tls = ours.believed();
        eventually(why, async || {
            let called = call(&server.endpoint, tls.clone()).await;
            called.is_err_and(|error| error.replace(' ', "").contains(why))
        })
        .await;
    }
}

#[tokio::test]
async fn only_tls_of_today_is_spoken() {
    let authority = Authority::new();
    let files = Files::new(&authority.server(&[LOOPBACK], Validity::Now), None);
    let server = serve(files.load(), authority.believed()).await;

    let plain = server.endpoint.replace("https", "http");
    let plain = hallpass_client::connect(&plain).await;
    let refused = match plain {
        Ok(channel) => ask(channel).await.is_err(),
        Err(_) => true,
    };
    assert!(refused, "plain text on the port of TLS");

    let mut no_protocol = client(&authority, None);
    no_protocol.alpn_protocols.clear();
    let mut stream = shake_hands(server.address, no_protocol).await.unwrap();
    // It may have been closed already.
    drop(stream.write_all(PREFACE).await);
    assert_closed(stream.read_u8().await, "no protocol is asked for");
    let mut another_protocol = client(&authority, None);
    another_protocol.alpn_protocols = vec![b"http/1.1".to_vec()];
    let refused = shake_hands(server.address, another_protocol).await;
    assert!(refused.is_err(), "{refused:?}");

    // A hello of TLS 1.1: a cipher suite of its time, no compression, and one extension, signature algorithms.
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x14, 1, 0]);
    hello.extend([0, 8, 0, 13, 0, 4, 0, 2, 4, 3]);
    let length = u8::try_from(hello.len()).unwrap();
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(&record).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!((answer[0], &answer[5..]), (ALERT, &PROTOCOL_VERSION[..]));
}

fn assert_closed(read: std::io::Result<u8>, what: &str) {
    assert!(read.is_err(), "{what}: {read:?}");
}

#[tokio::test]
async fn a_clients_certificate_is_proven_or_the_handshake_fails() {
    let (ours, another) = (Authority::new(), Authority::new());
    let issued = ours.server(&[LOOPBACK], Validity::Now);
    let files = Files::new(&issued, Some(&another.pem));
    let server = serve(files.load(), ours.believed()).await;
    let shows = |identity: Option<Issued>| ClientTls {
        identity: identity.as_ref().map(Issued::identity),
        ..ours.believed()
    };
    let uri = &["spiffe://example/billing"][..];
    for (what, identity, is_let_in) in [
        ("none", None, true),
        ("right", Some(another.client(uri, &[], Validity::Now)), true),
        (
            "another authority",
            Some(ours.client(uri, &[], Validity::Now)),
            false,
        ),
        (
            "expired",
            Some(another.client(uri, &[], Validity::Expired)),
            false,
        ),
        (
            "not yet",
            Some(another.client(uri, &[], Validity::NotYet)),
            false,
        ),
        (
            "a server's",
            Some(another.server(&["a.example"], Validity::Now)),
            false,
        ),
    ] {
        let called = call(&server.endpoint, shows(identity)).await;
        assert_eq!(called.is_ok(), is_let_in, "{what}: {called:?}");
    }

    // The authority is replaced: who it vouched for gets in no more.
    let vouched_for = shows(Some(another.client(uri, &[], Validity::Now)));
    let third = Authority::new();
    files.swap(&issued.certificate, &issued.key, Some(&third.pem));
    eventually("the former authority is not believed", async || {
        call(&server.endpoint, vouched_for.clone()).await.is_err()
    })
    .await;
    let vouched_for = shows(Some(third.client(uri, &[], Validity::Now)));
    assert_eq!(call(&server.endpoint, vouched_for).await, Ok(()));
}

#[tokio::test]
async fn the_names_that_a_client_has_proven_are_its_peers() {
    let authority = Authority::new();
    let server = authority.server(&[LOOPBACK], Validity::Now);
    let files = Files::new(&server, Some(&authority.pem));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = connections();
    let acceptor = Acceptor::new(
        Listener::Tcp(listener),
        Some(Arc::new(files.load())),
        connections.clone(),
        Slots::new(&connections),
    );
    let mut incoming = pin!(acceptor.incoming());
    let uris = ["spiffe://example/billing", "https://example/b"];
    let issued = authority.client(&uris, &["billing.example", "*.b.example"], Validity::Now);
    for (identity, names) in [
        (
            Some(&issued),
            &[uris[0], uris[1], "billing.example", "*.b.example"][..],
        ),
        (None, &[]),
    ] {
        let greeting = async {
            let stream = shake_hands(address, client(&authority, identity)).await;
            let mut stream = stream.unwrap();
            stream.write_all(&[b'x'; 30]).await.unwrap();
            stream
        };
        let (_stream, io) = tokio::join!(greeting, incoming.next());
        let Ok(mut io) = io.unwrap();
        let found: Vec<&str> = io.peer().certificate_names.iter().map(|n| &**n).collect();
        assert_eq!(found, names);
        assert_eq!(io.peer().address, Some(address.ip()));
        // What was waited for is not lost to the reader.
        let mut read = [0; 30];
        io.read_exact(&mut read).await.unwrap();
        assert_eq!(read, [b'x'; 30]);
    }
}

#[tokio::test]
async fn nothing_that_was_proven_is_resumed() {
    let authority = Authority::new();
    let server = authority.server(&[LOOPBACK], Validity::Now);
    let files = Files::new(&server, Some(&authority.pem));
    let server = serve(files.load(), authority.believed()).await;
    let issued = authority.client(&["spiffe://example/a"], &[], Validity::Now);
    for version in ALL_VERSIONS {
        let config = Arc::new(client_of(&authority, Some(&issued), &[version]));
        for _ in 0..2 {
            let stream = TcpStream::connect(server.address).await.unwrap();
            let name = ServerName::try_from(LOOPBACK).unwrap();
            let connector = TlsConnector::from(Arc::clone(&config));
            let mut stream = connector.connect(name, stream).await.unwrap();
            // Tickets come with the first bytes, which are the service's settings.
            stream.write_all(PREFACE).await.unwrap();
            stream.read_u8().await.unwrap();
            let kind = stream.get_ref().1.handshake_kind();
            assert_eq!(kind, Some(HandshakeKind::Full));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_rotated_under_load_without_a_lost_call() {
    const CALLERS: usize = 4;
    const CALLS_BETWEEN: u64 = 100;
    let authority = Authority::new();
    let first = authority.server(&[LOOPBACK], Validity::Now);
    let files = Files::new(&first, None);
    let server = Arc::new(serve(files.load(), authority.believed()).await);
    assert_eq!(shown(server.address, &authority).await, first.der);

    let (calls, stop) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut callers = JoinSet::new();
    for index in 0..CALLERS {
        let (server, calls, stop) = (Arc::clone(&server), Arc::clone(&calls), Arc::clone(&stop));
        let believed = authority.believed();
        callers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                // Half of them connect anew for each call.
                if index % 2 == 0 {
                    let asked = question("lincoln", "bob", APPROVE);
                    assert!(server.try_check(asked).await.unwrap().response.allowed);
                } else {
                    call(&server.endpoint, believed.clone()).await.unwrap();
                }
                calls.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for _ in 0..3 {
        let next = authority.server(&[LOOPBACK], Validity::Now);
        files.swap(&next.certificate, &next.key, None);
        eventually(
            "new connections are shown the new certificate",
            async || shown(server.address, &authority).await == next.der,
        )
        .await;
        let target = calls.load(Ordering::Relaxed) + CALLS_BETWEEN;
        within("calls go on", PATIENCE, async {
            while calls.load(Ordering::Relaxed) < target && !callers.is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test]
async fn files_that_are_broken_replace_nothing() {
    let (authority, another) = (Authority::new(), Authority::new());
    let first = authority.server(&[LOOPBACK], Validity::Now);
    let second = authority.server(&[LOOPBACK], Validity::Now);
    let ca = Some(&*authority.pem);
    let files = Files::new(&first, ca);
    let tls = Arc::new(files.load());
    let database = Database::create().await;
    let config = Config {
        tls: Some(Arc::clone(&tls)),
        ..config(&database.url)
    };
    let server = Server::listening_tls(config, authority.believed()).await;
    for (certificate, key, ca, refused) in [
        (&*second.certificate, &*first.key, ca, "--tls-key `"),
        (&*second.certificate, "", ca, "--tls-key `"),
        ("", &*second.key, ca, "--tls-certificate `"),
        (&*second.key, &*second.key, ca, "--tls-certificate `"),
        (
            &*second.certificate,
            &*second.key,
            Some(""),
            "--tls-client-ca `",
        ),
        (
            "-----BEGIN CERTIFICATE-----\naGFsbHBhc3M=\n-----END CERTIFICATE-----",
            &*second.key,
            ca,
            "--tls-certificate `",
        ),
    ] {
        files.swap(certificate, key, ca);
        let error = tls.reload().unwrap_err().to_string();
        assert!(error.starts_with(refused), "{error}");
        assert!(error.contains(".pem`: "), "{error}");
        assert_eq!(shown(server.address, &authority).await, first.der);
    }
    std::fs::remove_file(&files.paths.key).unwrap();
    let error = tls.reload().unwrap_err().to_string();
    assert!(error.contains("No such file"), "{error}");
    assert_eq!(shown(server.address, &authority).await, first.der);

    files.swap(&second.certificate, &second.key, Some(&another.pem));
    eventually("what is whole again is used", async || {
        shown(server.address, &authority).await == second.der
    })
    .await;
    assert_eq!(tls.reload(), Ok(false));
}

#[tokio::test]
async fn the_commands_speak_tls_and_say_which_setting_is_wrong() {
    let authority = Authority::new();
    let issued = authority.server(&[LOOPBACK], Validity::Now);
    let files = Files::new(&issued, Some(&authority.pem));
    let server = serve(files.load(), authority.believed()).await;
    let shown = authority.client(&["spiffe://example/a"], &[], Validity::Now);
    let own = Files::new(&shown, Some(&authority.pem));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (ca, certificate, key) = (
        path(files.paths.client_ca.as_ref().unwrap()),
        path(&own.paths.certificate),
        path(&own.paths.key),
    );
    let (lincoln, bob) = (id("lincoln").to_string(), id("bob").to_string());
    let check = async |arguments: &[&str]| {
        let asked = ["check", &lincoln, &bob, APPROVE];
        hallpass(&[&asked[..], arguments].concat()).await
    };
    let https = ["--endpoint", &server.endpoint];
    let trusting = [&https[..], &["--ca-file", &ca]].concat();
    let pair = ["--client-certificate", &*certificate, "--client-key", &*key];
    for arguments in [trusting.clone(), [&trusting[..], &pair].concat()] {
        let ran = check(&arguments).await;
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    for (arguments, complaint) in [
        (https.to_vec(), "nobody answers at https"),
        (
            vec!["--ca-file", &*ca],
            "certificates are for an endpoint https",
        ),
        (
            [&https[..], &["--ca-file", "/no/such/file"]].concat(),
            "--ca-file: cannot read /no/such/file",
        ),
    ] {
        let ran = check(&arguments).await;
        assert_eq!(ran.code, 2, "{ran:?}");
        assert!(ran.complaint().concat().contains(complaint), "{ran:?}");
    }

    for (arguments, complaint) in [
        (vec!["--tls-certificate", &*certificate], "--tls-key"),
        (vec!["--tls-client-ca", &*ca], "--tls-certificate"),
        (
            vec!["--tls-certificate", &*certificate, "--tls-key", &*ca],
            "--tls-key `",
        ),
    ] {
        // Refused before a database is looked for.
        let ran = hallpass(&[&["serve", "--data-dir", "/no/such"][..], &arguments].concat()).await;
        assert_eq!(ran.code, 2, "{ran:?}");
        assert!(ran.complaint().concat().contains(complaint), "{ran:?}");
    }
}
