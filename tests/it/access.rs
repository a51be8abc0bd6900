//! The table of what each call needs, against the methods that are served, and through the wire.

use std::collections::{BTreeMap, BTreeSet};

use hallpass::{
    auth::{
        Scope,
        access::{ACCESS, Answer, Need},
        api_key::Pepper,
    },
    grpc::v1,
};
use prost::Message;
use prost_types::FileDescriptorSet;

use crate::{
    database::Database,
    keyring::{Made, TIMING, call, config_with_keys, key_id, refusal, revoke},
    server::Server,
};

/// Everything that the listener serves.
const SERVED: [&[u8]; 3] = [
    v1::DESCRIPTORS,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
];

/// Each, and whether it is answered with a stream.
fn served_methods() -> BTreeSet<(String, bool)> {
    let mut methods = BTreeSet::new();
    for descriptors in SERVED {
        for file in FileDescriptorSet::decode(descriptors).unwrap().file {
            for service in &file.service {
                let service_name = format!("{}.{}", file.package(), service.name());
                methods.extend(service.method.iter().map(|method| {
                    let path = format!("/{service_name}/{}", method.name());
                    (path, method.server_streaming())
                }));
            }
        }
    }
    methods
}

#[test]
fn every_method_says_what_it_needs_and_every_row_is_a_method() {
    let rows: BTreeSet<(String, bool)> = ACCESS
        .iter()
        .map(|(path, _, answer)| ((*path).to_owned(), *answer != Answer::Message))
        .collect();
    assert_eq!(rows.len(), ACCESS.len(), "a method has two rows");
    assert_eq!(served_methods(), rows);
}

/// Whoever changes what a method needs says so here.
#[test]
fn the_table_is_this() {
    let mut table: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (path, need, _) in ACCESS {
        let name = path.rsplit('/').next().unwrap();
        table.entry(format!("{need:?}")).or_default().push(name);
    }
    let admin = [
        "ListOrganizationPermissions",
        "SetOrganizationPermission",
        "BulkSetOrganizationPermissions",
        "ResetOrganizationPermission",
        "PutMember",
        "RemoveMember",
        "GrantUserPermission",
        "RevokeUserPermission",
        "PutPermissionTemplate",
        "DeletePermissionTemplate",
    ];
    let expected = [
        ("Credential", vec!["ServerReflectionInfo"]),
        ("Nothing", vec!["Check", "Watch"]),
        ("Scope(Admin)", admin.to_vec()),
        (
            "Scope(Audit)",
            vec!["StreamAuditEntries", "ListAuditEntries"],
        ),
        (
            "Scope(Check)",
            vec!["CheckPermission", "BatchCheckPermissions"],
        ),
        (
            "Scope(List)",
            vec![
                "ListUserPermissions",
                "ListPermissionHolders",
                "ListUserOrganizations",
                "GetOrganizationSummary",
            ],
        ),
    ];
    let expected = expected.map(|(need, names)| (need.to_owned(), names));
    assert_eq!(table, BTreeMap::from(expected));
}

/// Each method with each kind of credential. The message is empty: a call that is let in fails for another reason, or
/// succeeds.
#[tokio::test]
async fn every_method_asks_for_what_it_needs() {
    let database = Database::create().await;
    let url = &database.url;
    let good = Made::default().make(url).await;
    let expired = Made::expired().make(url).await;
    let revoked = Made::default().make(url).await;
    revoke(url, &revoked).await;
    let wrong = format!("hp_{}_{}", key_id(&good), "0".repeat(64));
    let mut with_all_but = BTreeMap::new();
    for missing in Scope::ALL {
        let others = Scope::ALL.into_iter().filter(|scope| *scope != missing);
        let made = Made {
            scopes: others.map(Scope::name).collect(),
            ..Made::default()
        };
        with_all_but.insert(missing.name(), made.make(url).await);
    }
    let server = Server::start(config_with_keys(url, TIMING, Pepper::default())).await;

    for (path, need, _) in ACCESS {
        let said = async |key: &str| {
            let header = format!("Bearer {key}");
            refusal(&call(&server.channel, path, &[&header]).await)
        };
        let refused = |reason: &'static str| if need == Need::Nothing { "" } else { reason };
        let nobody = refusal(&call(&server.channel, path, &[]).await);
        assert_eq!(nobody, refused("CREDENTIAL_MISSING"), "{path}");
        assert_eq!(said(&wrong).await, refused("CREDENTIAL_INVALID"), "{path}");
        assert_eq!(said("hp_").await, refused("CREDENTIAL_INVALID"), "{path}");
        assert_eq!(
            said(&expired).await,
            refused("CREDENTIAL_EXPIRED"),
            "{path}"
        );
        assert_eq!(
            said(&revoked).await,
            refused("CREDENTIAL_REVOKED"),
            "{path}"
        );
        assert_eq!(said(&good).await, "", "{path}");
        for (missing, key) in &with_all_but {
            let needs_it = matches!(need, Need::Scope(scope) if scope.name() == *missing);
            let expected = if needs_it { "SCOPE_MISSING" } else { "" };
            assert_eq!(said(key).await, expected, "{path} without {missing}");
        }
    }
}
