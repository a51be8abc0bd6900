//! TLS to PostgreSQL: each `sslmode` against servers that prove themselves and servers that do not, and a whole service
//! over it.
//!
//! The server has an address on the loopback network to itself, since it must have its own port too.

use std::{
    fs::{self, Permissions},
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    time::Instant,
};

use hallpass::{
    embedded::PrivatePostgres,
    store::{DatabaseUrl, DedicatedConnection, Store, StoreError, migrations::migrate},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::spawn_blocking,
};
use tokio_postgres::Client;

use crate::{
    database::{as_role, connect, eventually},
    pools::{CANCELLED_WITHIN, HANG, HANGING},
    roles::make_roles,
    server::{APPROVE, Server, config, fill, set_role},
    support::{options, temporary_directory},
};

/// Who may log in how. What is not listed is refused.
const HBA: &str = "
local   all all                    trust
hostssl all certified 127.0.0.0/8  cert
host    all secretive 127.0.0.0/8  scram-sha-256
host    all all       127.0.0.0/8  trust
";

const LOGINS: &str = "
SET password_encryption = 'scram-sha-256';
CREATE ROLE certified LOGIN;
CREATE ROLE secretive LOGIN PASSWORD 'sesame'";

/// How a connection is encrypted; no row: there is none.
const ENCRYPTION: &str = "
SELECT coalesce(version, 'plain')
FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = $1";

/// A service's connections, and how many of them are encrypted.
const CONNECTIONS: &str = "
SELECT count(*), count(*) FILTER (WHERE ssl)
FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'hallpass'";

/// How a client begins: it asks for encryption, or it takes a question back.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// A PostgreSQL with TLS, and the files of those who speak to it.
struct TlsPostgres {
    postgres: PrivatePostgres,
    address: Ipv4Addr,
    directory: TempDir,
    /// On the Unix socket.
    superuser: Client,
}

impl TlsPostgres {
    async fn start() -> Self {
        static COUNT: AtomicU8 = AtomicU8::new(1);
        let [.., high, low] = process::id().to_be_bytes();
        let address = Ipv4Addr::new(127, high | 1, low, COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = temporary_directory();
        let hba = directory.path().join("pg_hba.conf");
        fs::write(&hba, HBA).unwrap();
        fs::set_permissions(&hba, Permissions::from_mode(0o644)).unwrap();
        let data_dir = directory.path().join("data");
        let mut options = options(&data_dir);
        let settings = [
            ("listen_addresses", address.to_string()),
            ("hba_file", hba.to_str().unwrap().to_owned()),
        ];
        (options.settings).extend(settings.map(|(name, value)| (name.to_owned(), value)));
        let postgres = spawn_blocking(move || PrivatePostgres::start(&options).unwrap());
        let postgres = postgres.await.unwrap();
        let superuser = connect(&postgres.url()).await;
        superuser.batch_execute(LOGINS).await.unwrap();
        let started = Self {
            postgres,
            address,
            directory,
            superuser,
        };
        started.certify();
        started
    }

    /// Writes everybody's certificates: two authorities' (`ca`, `other`), of the first the server's (`server`,
    /// `expired`) and a client's (`client`), and one that a server has made itself (`own`).
    fn certify(&self) {
        let authority = |name: &str| {
            let mut params = CertificateParams::new([]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(DnType::CommonName, name);
            let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap());
            let issuer = issuer.unwrap();
            self.write(&format!("{name}.crt"), &issuer.pem());
            issuer
        };
        let (ca, _) = (authority("ca"), authority("other"));
        let certify = |name: &str, params: CertificateParams| {
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &ca).unwrap();
            self.write(&format!("{name}.crt"), &certificate.pem());
            self.write(&format!("{name}.key"), &key.serialize_pem());
        };
        let names = ["db.test".to_owned(), self.address.to_string()];
        let mut server = CertificateParams::new(names).unwrap();
        certify("server", server.clone());
        server.not_before = date_time_ymd(2020, 1, 1);
        server.not_after = date_time_ymd(2021, 1, 1);
        certify("expired", server);
        // As `openssl req -x509` makes it.
        let mut own = CertificateParams::new(["db.test".to_owned()]).unwrap();
        own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        self.write("own.crt", &own.self_signed(&key).unwrap().pem());
        self.write("own.key", &key.serialize_pem());
        let mut client = CertificateParams::new([]).unwrap();
        client
            .distinguished_name
            .push(DnType::CommonName, "certified");
        certify("client", client);
    }

    /// Writes a file that postgres' user, whom the cluster belongs to, takes for its own.
    fn write(&self, name: &str, text: &str) {
        let owner = fs::metadata(self.directory.path().join("data/postgres")).unwrap();
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the server shows from now on: the certificate of this name, or none.
    async fn show(&self, certificate: Option<&str>) {
        let mut settings = vec![(
            "ssl",
            if certificate.is_some() { "on" } else { "off" }.to_owned(),
        )];
        if let Some(name) = certificate {
            let path = |suffix: &str| self.path(suffix).to_str().unwrap().to_owned();
            settings.push(("ssl_cert_file", path(&format!("{name}.crt"))));
            settings.push(("ssl_key_file", path(&format!("{name}.key"))));
            settings.push(("ssl_ca_file", path("ca.crt")));
        }
        for (name, value) in &settings {
            let set = format!("ALTER SYSTEM SET {name} = '{value}'");
            self.superuser.batch_execute(&set).await.unwrap();
        }
        let reload = "SELECT pg_reload_conf()";
        self.superuser.batch_execute(reload).await.unwrap();
        let (name, value) = settings.get(1).unwrap_or(&settings[0]);
        eventually("the server has changed what it shows", async || {
            // By a new session, which is as the postmaster is.
            let session = connect(&self.postgres.url()).await;
            let row = session.query_one(&format!("SHOW {name}"), &[]).await;
            row.unwrap().get::<_, &str>(0) == value
        })
        .await;
    }

    /// `parameters` may say `ca`, `other` and so on for the files of these names.
    fn url(&self, host: &str, user: &str, parameters: &str) -> String {
        let mut url = format!(
            "postgresql:///hallpass?host={host}&hostaddr={}&port=5432&user={user}",
            self.address
        );
        for parameter in parameters.split_terminator('&') {
            let (name, value) = parameter.split_once('=').unwrap();
            let value = match name {
                "sslrootcert" | "sslcert" => {
                    self.path(&format!("{value}.crt")).display().to_string()
                }
                "sslkey" => self.path(&format!("{value}.key")).display().to_string(),
                _ => value.to_owned(),
            };
            url.push_str(&format!("&{name}={value}"));
        }
        url
    }

    /// How a connection to this URL is encrypted: `plain`, the protocol's version, or what refuses it.
    async fn encryption(&self, url: &str) -> String {
        let url = format!("{url}&application_name=asked");
        let url: DatabaseUrl = url.parse().unwrap();
        let connection = match DedicatedConnection::open(&url, None).await {
            Err(StoreError::Refused(why)) => return why,
            connection => connection.unwrap(),
        };
        let row = self.superuser.query_one(ENCRYPTION, &[&"asked"]).await;
        drop(connection);
        eventually("the connection has ended", async || {
            let rows = self.superuser.query(ENCRYPTION, &[&"asked"]).await;
            rows.unwrap().is_empty()
        })
        .await;
        row.unwrap().get(0)
    }

    /// Each line: what comes of a connection, the host's name, the parameters.
    async fn assert_connections(&self, cases: &str) {
        for case in cases.trim().lines() {
            let mut parts = case.trim().split(" | ");
            let expected = parts.next().unwrap();
            let host = parts
                .next()
                .unwrap()
                .replace("ADDRESS", &self.address.to_string());
            let url = self.url(&host, "hallpass", parts.next().unwrap_or_default());
            let found = self.encryption(&url).await;
            assert!(found.contains(expected), "{case}: {found}");
            if !["plain", "TLS"].contains(&expected) {
                assert!(found.ends_with("sslmode and sslrootcert"), "{found}");
            }
        }
    }

    async fn stop(self) {
        spawn_blocking(move || self.postgres.stop().unwrap())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn each_mode_takes_the_servers_that_it_should() {
    let server = TlsPostgres::start().await;
    server.show(Some("server")).await;
    server
        .assert_connections(
            "
            plain | db.test | sslmode=disable
            TLS | db.test
            TLS | db.test | sslmode=prefer
            TLS | elsewhere.test | sslmode=prefer
            TLS | elsewhere.test | sslmode=require
            TLS | elsewhere.test | sslmode=require&sslrootcert=ca
            UnknownIssuer | db.test | sslmode=require&sslrootcert=other
            TLS | elsewhere.test | sslmode=verify-ca&sslrootcert=ca
            UnknownIssuer | db.test | sslmode=verify-ca&sslrootcert=other
            TLS | db.test | sslmode=verify-full&sslrootcert=ca
            TLS | ADDRESS | sslmode=verify-full&sslrootcert=ca
            TLS | db.test | sslrootcert=ca
            not valid for name | elsewhere.test | sslmode=verify-full&sslrootcert=ca
            not valid for name | 127.0.0.1 | sslmode=verify-full&sslrootcert=ca
            not valid for name | elsewhere.test | sslrootcert=ca
            UnknownIssuer | db.test | sslmode=verify-full&sslrootcert=other
            UnknownIssuer | db.test | sslmode=verify-full
            ",
        )
        .await;
    server.show(Some("expired")).await;
    server
        .assert_connections(
            "
            TLS | db.test | sslmode=require
            certificate expired | db.test | sslmode=verify-ca&sslrootcert=ca
            certificate expired | db.test | sslmode=verify-full&sslrootcert=ca
            ",
        )
        .await;
    server.show(Some("own")).await;
    server
        .assert_connections(
            "
            TLS | db.test | sslmode=require
            CaUsedAsEndEntity | db.test | sslmode=verify-full&sslrootcert=own
            ",
        )
        .await;
    server.show(None).await;
    server
        .assert_connections(
            "
            plain | db.test
            plain | db.test | sslmode=disable
            plain | db.test | sslmode=prefer
            does not support TLS | db.test | sslmode=require
            does not support TLS | db.test | sslmode=verify-ca&sslrootcert=ca
            does not support TLS | db.test | sslmode=verify-full&sslrootcert=ca
            ",
        )
        .await;
    server.stop().await;
}

/// A certificate in the place of a password, and a password that is worth nothing on another connection.
#[tokio::test]
async fn logins_use_what_encryption_offers() {
    let server = TlsPostgres::start().await;
    server.show(Some("server")).await;
    let cases = [
        (
            "certified",
            "sslmode=verify-full&sslrootcert=ca&sslcert=client&sslkey=client",
            "TLSv1.3",
        ),
        (
            "certified",
            "sslmode=verify-full&sslrootcert=ca",
            "certificate",
        ),
        (
            "secretive",
            "sslmode=verify-full&sslrootcert=ca&password=sesame&channel_binding=require",
            "TLSv1.3",
        ),
        (
            "secretive",
            "sslmode=disable&password=sesame&channel_binding=require",
            "channel binding",
        ),
        (
            "secretive",
            "sslmode=require&password=wrong",
            "password authentication failed",
        ),
    ];
    for (user, parameters, expected) in cases {
        let url = server.url("db.test", user, parameters);
        let found = server.encryption(&url).await;
        assert!(found.contains(expected), "{user} {parameters}: {found}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_handshake_that_the_network_ends_can_be_tried_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let url = format!("postgresql://u@127.0.0.1:{port}/d?sslmode=require");
    let url: DatabaseUrl = url.parse().unwrap();
    let opened = tokio::spawn(async move { DedicatedConnection::open(&url, None).await.map(drop) });
    let (mut connection, _) = listener.accept().await.unwrap();
    let mut request = [0; 8];
    connection.read_exact(&mut request).await.unwrap();
    assert_eq!(request, SSL_REQUEST);
    connection.write_all(b"S").await.unwrap();
    drop(connection);
    let error = opened.await.unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
}

/// A way to the server that notes how each connection begins. Ends with its runtime.
async fn watch(server: &TlsPostgres) -> (u16, Arc<Mutex<Vec<[u8; 8]>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let begun = Arc::new(Mutex::new(Vec::new()));
    let (notes, target) = (Arc::clone(&begun), (server.address, 5432));
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let notes = Arc::clone(&notes);
            tokio::spawn(async move {
                let mut first = [0; 8];
                if near.read_exact(&mut first).await.is_err() {
                    return;
                }
                notes.lock().unwrap().push(first);
                let mut far = TcpStream::connect(target).await.unwrap();
                far.write_all(&first).await.unwrap();
                // Either side may go away without a word.
                drop(copy_bidirectional(&mut near, &mut far).await);
            });
        }
    });
    (port, begun)
}

#[tokio::test]
async fn all_that_a_service_says_is_encrypted() {
    let server = TlsPostgres::start().await;
    server.show(Some("server")).await;
    make_roles(&server.postgres.url(), None).await.unwrap();
    let (port, begun) = watch(&server).await;
    let ca = server.path("ca.crt");
    let url = format!(
        "postgresql:///hallpass?host=db.test&hostaddr=127.0.0.1&port={port}&user=hallpass&sslmode=verify-full&sslrootcert={}",
        ca.display()
    );
    let migrator = as_role(&url, "hallpass_migrator").parse().unwrap();
    migrate(&migrator, |_| {}).await.unwrap();
    fill(&server.superuser).await;

    let service = Server::start(config(&url)).await;
    set_role(&server.superuser, "lincoln", "bob", "volunteer").await;
    // By a notification: the log's connection listens.
    service.catch_up(&server.superuser).await;
    let answer = service.check("lincoln", "bob", APPROVE).await;
    assert_eq!(answer.said, "deny ROLE_TOO_LOW");
    let row = server.superuser.query_one(CONNECTIONS, &[]).await.unwrap();
    let (all, encrypted): (i64, i64) = (row.get(0), row.get(1));
    assert_eq!(all, encrypted);
    // Both pools, the log's and the inspection's.
    assert!(all >= 17, "{all}");
    service.stop().await;

    // What takes a question back, too.
    server.superuser.batch_execute(HANG).await.unwrap();
    let url = as_role(&url, "hallpass_service").parse().unwrap();
    let store = Store::new(&url).unwrap();
    let before = begun.lock().unwrap().len();
    let began = Instant::now();
    store.ping().await.unwrap_err();
    eventually("the question is given up", async || {
        let row = server.superuser.query_one(HANGING, &[]).await;
        row.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    assert!(began.elapsed() < CANCELLED_WITHIN, "{:?}", began.elapsed());
    let begun = begun.lock().unwrap().clone();
    assert_eq!(begun.len() - before, 2, "a question and a cancellation");
    assert!(begun.iter().all(|first| *first == SSL_REQUEST), "{begun:?}");
    server.stop().await;
}
