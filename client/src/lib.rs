//! Client for hallpass: the generated `hallpass.v1` types, one function that connects, and [`Credential`].
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

use std::{path::PathBuf, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue},
    service::Interceptor,
    transport::{Channel, Endpoint, Error},
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

/// Connects to `http://HOST:PORT` or `unix:PATH`.
///
/// # Errors
/// When the address is malformed or nobody answers there within five seconds.
pub async fn connect(endpoint: &str) -> Result<Channel, Error> {
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
