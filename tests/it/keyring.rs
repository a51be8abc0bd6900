//! API keys for tests: made as `hallpass keys create` makes them, and sent with calls of any method.

use std::{sync::Arc, time::Duration};

use hallpass::{
    auth::{
        Authenticator,
        api_key::{ApiKey, Pepper},
        keys::{ApiKeys, Timing},
    },
    server::Config,
    store::{DedicatedConnection, api_keys::NewKey},
};
use hallpass_client::{
    Credential,
    tonic::{
        Code, Request, Status, client::Grpc, codegen::http::uri::PathAndQuery,
        service::interceptor::InterceptedService, transport::Channel,
    },
    v1::permission_service_client::PermissionServiceClient,
};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    database::as_role,
    server::{Server, config},
};

pub(crate) const CHECK: &str = "/hallpass.v1.PermissionService/CheckPermission";

pub(crate) const ALL_SCOPES: [&str; 5] = ["check", "list", "audit", "admin", "metrics"];

/// As the service has it by default, but for the wait before the use of keys is recorded.
pub(crate) const TIMING: Timing = Timing {
    staleness_bound: Duration::from_secs(2),
    staleness_ceiling: Duration::from_secs(300),
    record_interval: Duration::from_millis(100),
};

/// A service that asks for API keys.
pub(crate) fn config_with_keys(url: &str, timing: Timing, pepper: Pepper) -> Config {
    let keys = ApiKeys::new(timing, pepper);
    Config {
        authenticator: Arc::new(Authenticator::default().with_keys(keys)),
        ..config(url)
    }
}

/// What a key is for, and how long.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) scopes: Vec<&'static str>,
    pub(crate) organizations: Option<Vec<Uuid>>,
    pub(crate) valid_for: Option<Duration>,
    pub(crate) pepper: Pepper,
}

impl Default for Made {
    /// A key for everything.
    fn default() -> Self {
        Self {
            scopes: ALL_SCOPES.into(),
            organizations: None,
            valid_for: None,
            pepper: Pepper::default(),
        }
    }
}

impl Made {
    /// One that has expired as soon as it is there.
    pub(crate) fn expired() -> Self {
        Self {
            valid_for: Some(Duration::from_micros(1)),
            ..Self::default()
        }
    }

    /// Makes it in the database that the superuser's URL names; returns the whole of it.
    pub(crate) async fn make(self, url: &str) -> String {
        let key = ApiKey::generate().unwrap();
        manager(url)
            .await
            .api_key_insert(&NewKey {
                id: key.id.as_str(),
                hash: &key.hash(&self.pepper),
                name: "a test's",
                scopes: &self.scopes,
                organizations: self.organizations.as_deref(),
                valid_for: self.valid_for,
            })
            .await
            .unwrap();
        key.reveal()
    }
}

/// A connection that may manage keys.
pub(crate) async fn manager(url: &str) -> DedicatedConnection {
    let url = as_role(url, "hallpass_migrator").parse().unwrap();
    DedicatedConnection::open(&url, None).await.unwrap()
}

/// The id of a key.
pub(crate) fn key_id(key: &str) -> &str {
    key.split('_').nth(1).unwrap()
}

pub(crate) async fn revoke(url: &str, key: &str) {
    let revoked = manager(url).await.api_key_revoke(key_id(key)).await;
    revoked.unwrap();
}

/// A client of the service that identifies itself with a key.
pub(crate) fn client_with(
    server: &Server,
    key: &str,
) -> PermissionServiceClient<InterceptedService<Channel, Credential>> {
    let credential = Credential::bearer(key).unwrap();
    PermissionServiceClient::with_interceptor(server.channel.clone(), credential)
}

/// Calls a method, whatever it is, with an empty message and these `authorization` headers; the first thing that comes
/// back.
pub(crate) async fn call(
    channel: &Channel,
    path: &str,
    authorization: &[&str],
) -> Result<(), Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let mut request = Request::new(());
    for value in authorization {
        let value = value.parse().unwrap();
        request.metadata_mut().append("authorization", value);
    }
    let path: PathAndQuery = path.parse().unwrap();
    let codec = ProstCodec::<(), ()>::default();
    let answer = grpc.server_streaming(request, path, codec).await?;
    answer.into_inner().message().await.map(drop)
}

/// Why a call was not let in, as ErrorInfo has it; empty where it was.
pub(crate) fn refusal(called: &Result<(), Status>) -> String {
    let Err(status) = called else {
        return String::new();
    };
    let code = status.code();
    let reason = status
        .get_error_details()
        .error_info()
        .map(|info| info.reason.clone());
    match code {
        Code::Unauthenticated | Code::PermissionDenied => reason.unwrap(),
        Code::Unavailable if reason.as_deref() == Some("CREDENTIALS_UNAVAILABLE") => {
            let details = status.get_error_details();
            assert!(details.retry_info().is_some(), "{status:?}");
            reason.unwrap()
        }
        // It is about the message, which only who is let in hears of.
        _ => String::new(),
    }
}

/// Whether a key lets in, and if not why.
pub(crate) async fn with_key(server: &Server, key: &str) -> String {
    refusal(&call(&server.channel, CHECK, &[&format!("Bearer {key}")]).await)
}
