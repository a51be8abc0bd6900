//! What is asked of a service: questions about users, encoded once.

use std::{fs, path::Path, sync::Arc};

use anyhow::{Context, bail};
use hallpass_client::v1::{
    BatchCheckPermissionsItem, BatchCheckPermissionsRequest, CheckPermissionRequest,
    ListUserPermissionsRequest,
};
use prost::Message;
use uuid::Uuid;

use super::target::Target;
use crate::load::{Draw, Questions};

const CHECK: &str = "/hallpass.v1.PermissionService/CheckPermission";
const BATCH: &str = "/hallpass.v1.PermissionService/BatchCheckPermissions";
const LIST: &str = "/hallpass.v1.PermissionService/ListUserPermissions";

/// Different messages of a workload whose messages are long.
const LONG_MESSAGES: usize = 256;

/// Whom questions are about, and which permission each.
pub(super) struct Asked(Vec<(Uuid, Uuid, String)>);

impl Asked {
    pub(super) fn new(asked: Vec<(Uuid, Uuid, String)>) -> Self {
        Self(asked)
    }

    pub(super) fn read(file: &Path) -> anyhow::Result<Self> {
        let name = file.display();
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
        let lines = text.lines().enumerate();
        let asked: anyhow::Result<Vec<_>> = lines
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(index, line)| {
                let fields: Vec<&str> = line.split(',').map(str::trim).collect();
                let [organization, user, permission] = fields[..] else {
                    bail!("{name}:{}: not ORGANIZATION,USER,PERMISSION", index + 1);
                };
                let id = |id, what| {
                    Uuid::try_parse(id)
                        .with_context(|| format!("{name}:{}: the {what} is no UUID", index + 1))
                };
                Ok((
                    id(organization, "organization")?,
                    id(user, "user")?,
                    permission.to_owned(),
                ))
            })
            .collect();
        let asked = asked?;
        if asked.is_empty() {
            bail!("{name} has no questions");
        }
        Ok(Self(asked))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn checks(&self, target: &Target, draw: Draw) -> Questions {
        let messages = self.0.iter().map(|(organization, user, permission)| {
            check(*organization, *user, permission).encode_to_vec()
        });
        questions(CHECK, target, draw, messages.collect())
    }

    /// Checks of users whom nobody knows, each once, in the organizations that are known.
    pub(super) fn checks_of_strangers(&self, target: &Target, count: usize) -> Questions {
        let messages = self.0.iter().cycle().take(count);
        let messages = messages.map(|(organization, _, permission)| {
            check(*organization, Uuid::new_v4(), permission).encode_to_vec()
        });
        questions(CHECK, target, Draw::InTurn, messages.collect())
    }

    pub(super) fn batches(&self, target: &Target, draw: Draw, items: usize) -> Questions {
        let mut asked = self.0.iter().cycle();
        let messages = (0..LONG_MESSAGES).map(|_| {
            let items = asked.by_ref().take(items);
            let items = items.map(
                |(organization, user, permission)| BatchCheckPermissionsItem {
                    organization_id: organization.to_string(),
                    user_id: user.to_string(),
                    permission: permission.clone(),
                },
            );
            BatchCheckPermissionsRequest {
                items: items.collect(),
                ..Default::default()
            }
            .encode_to_vec()
        });
        questions(BATCH, target, draw, messages.collect())
    }

    pub(super) fn lists(&self, target: &Target, draw: Draw) -> Questions {
        let messages = self.0.iter().map(|(organization, user, _)| {
            ListUserPermissionsRequest {
                organization_id: organization.to_string(),
                user_id: user.to_string(),
                ..Default::default()
            }
            .encode_to_vec()
        });
        questions(LIST, target, draw, messages.collect())
    }

    /// One of them, as clients ask it.
    pub(super) fn first(&self) -> CheckPermissionRequest {
        let (organization, user, permission) = &self.0[0];
        check(*organization, *user, permission)
    }
}

fn check(organization: Uuid, user: Uuid, permission: &str) -> CheckPermissionRequest {
    CheckPermissionRequest {
        organization_id: organization.to_string(),
        user_id: user.to_string(),
        permission: permission.to_owned(),
        ..Default::default()
    }
}

fn questions(
    path: &'static str,
    target: &Target,
    draw: Draw,
    messages: Arc<[Vec<u8>]>,
) -> Questions {
    Questions {
        path,
        token: target.token.clone(),
        messages,
        draw,
    }
}
