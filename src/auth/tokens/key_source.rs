//! Where the issuer's keys are read: a URL or a file.
//!
//! Invariant: what the network says is believed only from the issuer's own server (TLS, or this machine), from the very
//! address that was set (redirects are not followed), and within a bound of bytes and of time.

use std::{
    fmt,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use http::{
    Request, StatusCode, Uri,
    header::{ACCEPT, HeaderValue},
};
use http_body_util::{BodyExt, Limited};
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject},
};

/// Bytes of a key set: a hundred keys, certificate chains included.
const DOCUMENT_BYTES_MAX: usize = 256 << 10;

/// A URL or a file that holds a JSON Web Key Set.
#[derive(Clone)]
pub enum KeySource {
    Url(Uri, Box<HttpClient>),
    File(PathBuf),
}

/// Asks for a key set; the body of its requests is empty.
pub type HttpClient = Client<HttpsConnector<HttpConnector>, String>;

impl KeySource {
    /// A source by its name, `https://…` or a path. `ca_file` holds the certificates (PEM) of the only authorities to
    /// trust; without it those that the system trusts are.
    ///
    /// # Errors
    /// When it is no such name, or there is no authority to trust.
    pub fn new(name: &str, ca_file: Option<&Path>) -> Result<Self, String> {
        if !name.contains("://") {
            return Ok(Self::File(name.into()));
        }
        let uri: Uri = name.parse().map_err(|_| "is not a URL".to_owned())?;
        if uri
            .authority()
            .is_some_and(|host| host.as_str().contains('@'))
        {
            return Err(
                "must not have a user or a password in it: nothing would be done with them"
                    .to_owned(),
            );
        }
        let is_encrypted = match uri.scheme_str() {
            Some("https") => true,
            Some("http") if is_loopback(&uri) => false,
            _ => return Err("must be https://, or http:// on this machine, or a path".to_owned()),
        };
        let client = client(is_encrypted, ca_file)?;
        Ok(Self::Url(uri, Box::new(client)))
    }

    /// The document as it is now.
    ///
    /// # Errors
    /// When there is none, or it is too large.
    pub(super) async fn read(&self) -> Result<Vec<u8>, String> {
        match self {
            Self::Url(uri, client) => fetch(uri, client).await,
            Self::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || read_file(&path));
                read.await.map_err(|error| error.to_string())?
            }
        }
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(uri, _) => f.write_str(&shown(&uri.to_string())),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A source's name as logs and errors have it: of a URL scheme, host, port and path. The rest may hold a secret.
#[must_use]
pub fn shown(name: &str) -> String {
    let Some((scheme, rest)) = name.split_once("://") else {
        return name.to_owned();
    };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    format!("{scheme}://{rest}")
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn client(is_encrypted: bool, ca_file: Option<&Path>) -> Result<HttpClient, String> {
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let config = match ca_file {
        Some(path) => config.with_root_certificates(roots(path)?),
        None if is_encrypted => config
            .with_native_roots()
            .map_err(|error| format!("the system's certificate authorities: {error}"))?,
        None => config.with_root_certificates(RootCertStore::empty()),
    };
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(config.with_no_client_auth())
        .https_or_http()
        .enable_http1()
        .build();
    // A connection would be idle for minutes: each document has its own.
    Ok(Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .build(connector))
}

fn roots(path: &Path) -> Result<RootCertStore, String> {
    let wrong = |error: String| format!("`{}`: {error}", path.display());
    let mut roots = RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong("holds no certificate".to_owned()));
    }
    Ok(roots)
}

async fn fetch(uri: &Uri, client: &HttpClient) -> Result<Vec<u8>, String> {
    let mut request = Request::new(String::new());
    *request.uri_mut() = uri.clone();
    let json = HeaderValue::from_static("application/json");
    request.headers_mut().insert(ACCEPT, json);
    let response = client.request(request).await;
    let response = response.map_err(|error| with_causes(&error))?;
    if response.status() != StatusCode::OK {
        return Err(format!("answered {}", response.status()));
    }
    let body = Limited::new(response.into_body(), DOCUMENT_BYTES_MAX).collect();
    let body = body.await.map_err(|error| with_causes(&*error))?;
    Ok(body.to_bytes().to_vec())
}

/// An error of the network with what is behind it, where the reason stands.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let most = DOCUMENT_BYTES_MAX as u64;
    let read = || {
        let mut document = Vec::new();
        File::open(path)?
            .take(most + 1)
            .read_to_end(&mut document)?;
        std::io::Result::Ok(document)
    };
    let document = read().map_err(|error| error.to_string())?;
    if document.len() > DOCUMENT_BYTES_MAX {
        return Err(format!("is larger than {DOCUMENT_BYTES_MAX} bytes"));
    }
    Ok(document)
}
