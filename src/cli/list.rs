//! `hallpass list`: asks a running service for every permission of a user.

use std::{path::Path, process::ExitCode};

use anyhow::{Context, anyhow};
use hallpass_client::{
    ClientIdentity, ClientTls, Credential,
    tonic::{Status, service::interceptor::InterceptedService, transport::Channel},
    v1::{
        ListUserPermissionsRequest, UserPermission, audit_service_client::AuditServiceClient,
        permission_service_client::PermissionServiceClient,
    },
};

use super::{
    answer,
    check::{describe, reason_name},
};
use crate::config::{ClientSettings, ListenAddress};

/// List what a user may do in an organization
#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// The organization's UUID
    organization: String,

    /// The user's UUID
    user: String,

    /// Only permissions of this module
    #[arg(long, default_value = "")]
    module: String,

    /// Only permissions that the user has
    #[arg(long)]
    allowed_only: bool,

    #[command(flatten)]
    client: ClientSettings,
}

impl List {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let listed = connect(&self.client)
            .await?
            .list_user_permissions(ListUserPermissionsRequest {
                organization_id: self.organization,
                user_id: self.user,
                module: self.module,
                allowed_only: self.allowed_only,
                consistency: None,
            })
            .await
            .map_err(explain_status)?
            .into_inner();
        let mut lines = vec![if listed.role.is_empty() {
            "no member of the organization, or a member without a role".to_owned()
        } else {
            format!("role {}", listed.role)
        }];
        let mut permissions = listed.permissions;
        permissions.sort_by(|a, b| (&a.module, &a.permission).cmp(&(&b.module, &b.permission)));
        lines.extend(table(&permissions));
        lines.extend(listed.evidence.as_ref().map(describe));
        lines.push(String::new());
        answer(&lines.join("\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn table(permissions: &[UserPermission]) -> Vec<String> {
    let width = permissions
        .iter()
        .map(|p| p.permission.len())
        .max()
        .unwrap_or(0);
    let mut module = "";
    let mut lines = Vec::new();
    for permission in permissions {
        if permission.module != module {
            module = &permission.module;
            lines.push(module.to_owned());
        }
        lines.push(format!(
            "  {}  {:width$}  {:19}  minimum role {}",
            if permission.allowed { "allow" } else { "deny " },
            permission.permission,
            reason_name(permission.reason().as_str_name()),
            if permission.effective_min_role.is_empty() {
                "-"
            } else {
                &permission.effective_min_role
            },
        ));
    }
    lines
}

/// A client that identifies itself as the settings say.
pub(super) async fn connect(
    settings: &ClientSettings,
) -> anyhow::Result<PermissionServiceClient<InterceptedService<Channel, Credential>>> {
    let (channel, credential) = open(settings).await?;
    Ok(PermissionServiceClient::with_interceptor(
        channel, credential,
    ))
}

/// As [`connect`], for the audit log.
pub(super) async fn audit_client(
    settings: &ClientSettings,
) -> anyhow::Result<AuditServiceClient<InterceptedService<Channel, Credential>>> {
    let (channel, credential) = open(settings).await?;
    Ok(AuditServiceClient::with_interceptor(channel, credential))
}

async fn open(settings: &ClientSettings) -> anyhow::Result<(Channel, Credential)> {
    let credential = match &settings.token {
        None => Credential::default(),
        // The cause would not say more, and might show the token.
        Some(token) => Credential::bearer(&token.0)
            .map_err(|_| anyhow!("--token: has characters that no credential has"))?,
    };
    if settings.token.is_some() && is_read_on_the_way(&settings.endpoint) {
        tracing::warn!(
            "--token goes to {} unencrypted: use https://",
            settings.endpoint
        );
    }
    Ok((channel(settings).await?, credential))
}

/// Whether others on the network read what is sent there.
fn is_read_on_the_way(endpoint: &str) -> bool {
    let Some(address) = endpoint.strip_prefix("http://") else {
        return false;
    };
    !address
        .parse::<ListenAddress>()
        .is_ok_and(|address| address.is_local())
}

async fn channel(client: &ClientSettings) -> anyhow::Result<Channel> {
    let endpoint = &client.endpoint;
    let identity = match (&client.client_certificate, &client.client_key) {
        (Some(certificate), Some(key)) => Some(ClientIdentity {
            certificate: read("--client-certificate", certificate)?,
            key: read("--client-key", key)?,
        }),
        _ => None,
    };
    let ca_file = client.ca_file.as_deref();
    let ca = ca_file.map(|file| read("--ca-file", file)).transpose()?;
    if ca.is_none() && identity.is_none() {
        return hallpass_client::connect(endpoint).await.with_context(|| {
            format!("nobody answers at {endpoint}: is `hallpass serve` running there?")
        });
    }
    let tls = ClientTls {
        ca,
        identity,
        server_name: None,
    };
    let connected = hallpass_client::connect_tls(endpoint, tls).await;
    connected.with_context(|| format!("no TLS connection to {endpoint}"))
}

fn read(flag: &str, file: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("{flag}: cannot read {}", file.display()))
}

/// A status on one line, its code as the protocol spells it.
pub(super) fn explain_status(status: Status) -> anyhow::Error {
    let code = format!("{:?}", status.code());
    let spelled: String = (code.chars().enumerate())
        .flat_map(|(index, c)| {
            (index > 0 && c.is_uppercase())
                .then_some('_')
                .into_iter()
                .chain([c.to_ascii_uppercase()])
        })
        .collect();
    anyhow!("{spelled}: {}", status.message())
}
