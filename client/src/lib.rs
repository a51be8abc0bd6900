//! Client for hallpass: the generated `hallpass.v1` types, functions that connect, and [`Credential`].
//!
//! ```no_run
//! use hallpass_client::v1::{CheckPermissionRequest, permission_service_client::PermissionServiceClient};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let channel = hallpass_client::connect("http://127.0.0.1:50051").await?;
//! let answer = PermissionServiceClient::new(channel)
//!     .check_permission(CheckPermissionRequest {
//!         organization_id: "0b9c3e0e-7f1a-4f0e-9a52-3f1d2c4b5a69".into(),
//!         user_id: "5d2c7a34-93c1-4e7b-8a0d-1e6f4b3c2d10".into(),
//!         permission: "can_approve_expenses".into(),
//!         ..Default::default()
//!     })
//!     .await?
//!     .into_inner();
//! println!("{} because {:?}", answer.allowed, answer.reason());
//! # Ok(())
//! # }
//! ```

use std::{fmt, path::PathBuf, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue},
    service::Interceptor,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Error, Identity},
};

/// The gRPC library that this client is built on: its `Status` and `Channel` are in the interface.
pub use tonic;

/// The messages and clients of `hallpass.v1`.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    reason = "generated from proto/hallpass/v1"
)]
pub mod v1 {
    tonic::include_proto!("hallpass.v1");
}

/// How long a connection attempt may take: a server on the same network answers well within it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a caller identifies with, sent along with every call: an API key or a token, or, by default, nothing.
///
/// ```no_run
/// use hallpass_client::{Credential, v1::permission_service_client::PermissionServiceClient};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let credential = Credential::bearer(&std::env::var("HALLPASS_TOKEN")?)?;
/// let channel = hallpass_client::connect("http://127.0.0.1:50051").await?;
/// let client = PermissionServiceClient::with_interceptor(channel, credential);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Credential(Option<MetadataValue<Ascii>>);

impl Credential {
    /// An API key (`hp_...`) or a token, which is not shown by `Debug`.
    ///
    /// # Errors
    /// When it has characters that no header may have.
    pub fn bearer(token: &str) -> Result<Self, InvalidMetadataValue> {
        let mut value = MetadataValue::try_from(format!("Bearer {token}"))?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

impl Interceptor for Credential {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            (request.metadata_mut()).insert("authorization", value.clone());
        }
        Ok(request)
    }
}

const HTTPS: &str = "https://";

/// How to make sure of a server, and how it may of the client, at `https://HOST:PORT`.
#[derive(Clone, Default)]
pub struct ClientTls {
    /// PEM: the only authorities that the server's certificate may come from. `None`: those that this machine trusts.
    pub ca: Option<Vec<u8>>,
    /// What to show to a server that asks for a certificate.
    pub identity: Option<ClientIdentity>,
    /// The name that the server's certificate must have. `None`: the endpoint's host.
    pub server_name: Option<String>,
}

/// A client's certificate.
#[derive(Clone)]
pub struct ClientIdentity {
    /// PEM: the certificate, and those that lead to its authority.
    pub certificate: Vec<u8>,
    /// PEM: its private key.
    pub key: Vec<u8>,
}

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// The endpoint is none for TLS, and so would not have honoured the [`ClientTls`].
    NotHttps,
    /// The address or the PEM is malformed, nobody answers there, or one end refuses the other's certificate.
    Transport(Error),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotHttps => f.write_str("certificates are for an endpoint https://HOST:PORT"),
            Self::Transport(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotHttps => None,
            Self::Transport(error) => error.source(),
        }
    }
}

/// Connects to `http://HOST:PORT`, `https://HOST:PORT` or `unix:PATH`. With https, the server's certificate must come
/// from an authority that this machine trusts, be valid and have the host's name.
///
/// # Errors
/// When the address is malformed, nobody answers there within five seconds, or the server's certificate is refused.
pub async fn connect(endpoint: &str) -> Result<Channel, Error> {
    if endpoint.starts_with(HTTPS) {
        return connect_https(endpoint, ClientTls::default()).await;
    }
    let Some(path) = endpoint.strip_prefix("unix:") else {
        return Endpoint::from_shared(endpoint.to_owned())?
            .connect_timeout(CONNECT_TIMEOUT)
            .connect()
            .await;
    };
    let path = PathBuf::from(path);
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
}

/// Connects to `https://HOST:PORT`, with certificates of one's own choice.
///
/// # Errors
/// As [`connect`]; and when the endpoint is not https, or the PEM is malformed.
pub async fn connect_tls(endpoint: &str, tls: ClientTls) -> Result<Channel, ConnectError> {
    if !endpoint.starts_with(HTTPS) {
        return Err(ConnectError::NotHttps);
    }
    let connected = connect_https(endpoint, tls).await;
    connected.map_err(ConnectError::Transport)
}

async fn connect_https(endpoint: &str, tls: ClientTls) -> Result<Channel, Error> {
    // What the machine trusts, a company's own authority too; and what it no longer trusts is gone without a build.
    let config = match tls.ca {
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    let config = match tls.identity {
        Some(identity) => config.identity(Identity::from_pem(identity.certificate, identity.key)),
        None => config,
    };
    let config = match tls.server_name {
        Some(name) => config.domain_name(name),
        None => config,
    };
    Endpoint::from_shared(endpoint.to_owned())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tls_config(config)?
        .connect()
        .await
}
