//! TLS for those who call: certificates and keys out of PEM files, which may change while the service runs.
//!
//! Invariant: a handshake that ends well has proven every name that it yields, by the files as they were when it began.
//! Nothing is resumed, so nothing that was proven outlives its connection. Files that are broken replace nothing.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::{
    RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::{TLS12, TLS13},
};
use thiserror::Error;
use tokio::{
    net::TcpStream,
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use webpki::EndEntityCert;
use x509_cert::der::{DateTime, Decode};

/// A chain of ten certificates has about 20 kB; a bundle of all public authorities a fifth of this.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Before 1.2 everything is broken. rustls has cipher suites with forward secrecy and authentication only.
const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

/// gRPC; a listener that speaks no other protocol.
pub const HTTP2: &[u8] = b"h2";
/// What a client means that names no protocol.
pub const HTTP1: &[u8] = b"http/1.1";

/// Renewals run a month before a certificate expires, mostly: two weeks before, one has failed.
const EXPIRY_WARNED_BEFORE: Duration = Duration::from_secs(14 * 24 * 60 * 60);
const EXPIRY_WARNING_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);

/// Everybody may read the file.
const READABLE_BY_ALL: u32 = 0o004;

/// Where certificates and keys are.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The service's certificate, and then those that lead to its authority.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The authorities of clients' certificates; `None`: clients are not asked for any.
    pub client_ca: Option<PathBuf>,
}

/// A file that cannot be used, and why.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{flag} `{}`: {why}", .file.display().to_string().escape_debug())]
pub struct TlsError {
    flag: &'static str,
    file: PathBuf,
    why: String,
}

/// TLS of one listener, as the files have it.
pub struct Tls {
    files: TlsFiles,
    protocols: Vec<Vec<u8>>,
    reload_interval: Duration,
    current: ArcSwap<Loaded>,
}

struct Loaded {
    config: Arc<ServerConfig>,
    digest: blake3::Hash,
    expires_at: DateTime,
}

/// What is in the files.
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the files. `protocols` are those that the listener speaks, the preferred one first.
    ///
    /// # Errors
    /// Names the setting and the file that cannot be used.
    pub fn load(
        files: TlsFiles,
        protocols: &[&[u8]],
        reload_interval: Duration,
    ) -> Result<Self, TlsError> {
        let protocols: Vec<Vec<u8>> = protocols.iter().map(|name| name.to_vec()).collect();
        let loaded = Loaded::new(&files, &files.read()?, &protocols)?;
        files.warn_of_open_key();
        Ok(Self {
            files,
            protocols,
            reload_interval,
            current: ArcSwap::from_pointee(loaded),
        })
    }

    /// When the certificate in use expires, since 1970.
    #[must_use]
    pub fn expires(&self) -> Duration {
        self.current.load().expires_at.unix_duration()
    }

    /// Whether clients are asked for certificates.
    #[must_use]
    pub fn asks_for_certificates(&self) -> bool {
        self.files.client_ca.is_some()
    }

    /// Speaks TLS on a connection; returns the names that its client has proven to have.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Arc<[Box<str>]>)> {
        let config = Arc::clone(&self.current.load().config);
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let session = stream.get_ref().1;
        if session.alpn_protocol().is_none() && !self.protocols.iter().any(|name| name == HTTP1) {
            return Err(io::Error::other("the client did not ask for HTTP/2 (ALPN)"));
        }
        let certificate = session.peer_certificates().and_then(<[_]>::first);
        let names = certificate.map_or_else(|| Ok(Arc::default()), names);
        let names = names.map_err(io::Error::other)?;
        Ok((stream, names))
    }

    /// Looks at the files, and uses them for new handshakes if they have changed; returns whether they had. Connections
    /// stay as they are.
    ///
    /// # Errors
    /// When they cannot be used: the former ones stay in use.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let contents = self.files.read()?;
        // What is in them, not when they were written: Kubernetes swaps a symbolic link.
        if contents.digest() == self.current.load().digest {
            return Ok(false);
        }
        let loaded = Loaded::new(&self.files, &contents, &self.protocols)?;
        self.current.store(Arc::new(loaded));
        Ok(true)
    }

    /// Reloads for as long as the service runs, and says when the certificate is about to expire.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut said = None;
        let mut warned_at = None;
        loop {
            self.warn_of_expiry(&mut warned_at);
            sleep(self.reload_interval).await;
            let tls = Arc::clone(&self);
            // A disk that is slow, or away, must not keep the calls of this thread waiting.
            let reloaded = spawn_blocking(move || tls.reload()).await;
            match reloaded {
                Ok(Ok(true)) => {
                    let expires = self.current.load().expires_at;
                    tracing::info!(%expires, "new certificates are in use");
                    (said, warned_at) = (None, None);
                }
                Ok(Ok(false)) => said = None,
                Ok(Err(error)) if said.as_ref() != Some(&error) => {
                    tracing::error!(%error, "the new certificates cannot be used: the former ones stay");
                    said = Some(error);
                }
                Ok(Err(_)) => {}
                Err(panic) => tracing::error!(error = %panic, "the certificates were not read"),
            }
        }
    }

    fn warn_of_expiry(&self, warned_at: &mut Option<Instant>) {
        let expires_at = self.current.load().expires_at;
        let is_due = warned_at.is_none_or(|at| at.elapsed() >= EXPIRY_WARNING_INTERVAL);
        let warned_from = expires_at
            .unix_duration()
            .saturating_sub(EXPIRY_WARNED_BEFORE);
        if is_due && UnixTime::now().as_secs() >= warned_from.as_secs() {
            *warned_at = Some(Instant::now());
            tracing::warn!(expires = %expires_at, "the TLS certificate expires: clients will refuse it");
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl TlsFiles {
    fn read(&self) -> Result<Contents, TlsError> {
        let client_ca = self.client_ca.as_deref();
        Ok(Contents {
            certificate: read("--tls-certificate", &self.certificate)?,
            key: read("--tls-key", &self.key)?,
            client_ca: client_ca
                .map(|file| read("--tls-client-ca", file))
                .transpose()?,
        })
    }

    fn warn_of_open_key(&self) {
        let metadata = self.key.metadata();
        if metadata.is_ok_and(|metadata| metadata.permissions().mode() & READABLE_BY_ALL != 0) {
            tracing::warn!(file = %self.key.display(), "everybody on this machine can read the TLS key");
        }
    }
}

impl Contents {
    fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let files = [
            Some(&self.certificate),
            Some(&self.key),
            self.client_ca.as_ref(),
        ];
        for file in files.into_iter().flatten() {
            // Of each by itself, so that what moves from one file to the next is a change.
            hasher.update(blake3::hash(file).as_bytes());
        }
        hasher.finalize()
    }
}

impl Loaded {
    fn new(files: &TlsFiles, contents: &Contents, protocols: &[Vec<u8>]) -> Result<Self, TlsError> {
        let of_certificate = |why| TlsError::new("--tls-certificate", &files.certificate, why);
        let of_key = |why| TlsError::new("--tls-key", &files.key, why);
        let chain = certificates(&contents.certificate).map_err(of_certificate)?;
        let expires_at = expiry(&chain).map_err(of_certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|error| of_key(format!("no private key in it: {error}")))?;

        // Named, so that another provider that a dependency brings is never taken by chance.
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&VERSIONS)
            .map_err(|error| of_certificate(error.to_string()))?;
        let config = match (&files.client_ca, &contents.client_ca) {
            (Some(file), Some(pem)) => {
                let roots = client_roots(pem, provider);
                let roots = roots.map_err(|why| TlsError::new("--tls-client-ca", file, why))?;
                config.with_client_cert_verifier(roots)
            }
            _ => config.with_no_client_auth(),
        };
        let mut config = config
            .with_single_cert(chain, key)
            .map_err(|error| of_key(format!("does not fit the certificate: {error}")))?;
        config.alpn_protocols = protocols.to_vec();
        // A session that is resumed is not verified anew. Connections live long: there is nothing to gain.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
            digest: contents.digest(),
            expires_at,
        })
    }
}

impl TlsError {
    fn new(flag: &'static str, file: &Path, why: String) -> Self {
        Self {
            flag,
            file: file.to_owned(),
            why,
        }
    }
}

fn read(flag: &'static str, file: &Path) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    let read =
        File::open(file).and_then(|opened| opened.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Err(error) => Err(TlsError::new(flag, file, error.to_string())),
        Ok(read) if read as u64 > FILE_BYTES_MAX => {
            let why = format!("more than {FILE_BYTES_MAX} bytes");
            Err(TlsError::new(flag, file, why))
        }
        Ok(_) => Ok(bytes),
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = certificates.map_err(|error| error.to_string())?;
    if certificates.is_empty() {
        return Err("no certificate in it".to_owned());
    }
    Ok(certificates)
}

/// When the first certificate of the chain expires.
fn expiry(chain: &[CertificateDer<'_>]) -> Result<DateTime, String> {
    let mut first = DateTime::INFINITY;
    for certificate in chain {
        let certificate = x509_cert::Certificate::from_der(certificate)
            .map_err(|error| format!("not a certificate: {error}"))?;
        let not_after = certificate.tbs_certificate.validity.not_after;
        first = first.min(not_after.to_date_time());
    }
    Ok(first)
}

/// Whom clients' certificates must come from. Without one a client may come in, and show who it is in another way.
fn client_roots(
    pem: &[u8],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|error| error.to_string())
}

/// The URI names in a certificate, and then the DNS names; read by what has verified it. Both are names to a grant: a URI
/// without `://` could pass for a DNS name, and is not taken.
fn names(certificate: &CertificateDer<'_>) -> Result<Arc<[Box<str>]>, webpki::Error> {
    let certificate = EndEntityCert::try_from(certificate)?;
    let uris = certificate
        .valid_uri_names()
        .filter(|uri| uri.contains("://"));
    Ok(uris
        .chain(certificate.valid_dns_names())
        .map(Box::from)
        .collect())
}
