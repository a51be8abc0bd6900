//! A client's certificate as the credential, from the handshake to the answer.

use std::sync::Arc;

use hallpass::{
    auth::{Authenticator, certificates::Certificates, grants::Grants},
    server::Config,
};
use hallpass_client::{
    ClientTls, Credential,
    v1::{CheckPermissionRequest, permission_service_client::PermissionServiceClient},
};

use crate::{
    database::Database,
    keyring::refusal,
    names::id,
    pki::{Authority, Files, Validity},
    server::{APPROVE, Server, config, fill, question},
};

/// What comes of a check by whoever shows this certificate, and sends this.
async fn said(endpoint: &str, tls: ClientTls, token: Option<&str>, organization: &str) -> String {
    let channel = hallpass_client::connect_tls(endpoint, tls).await.unwrap();
    let credential = token.map_or_else(Credential::default, |token| {
        Credential::bearer(token).unwrap()
    });
    let asked: CheckPermissionRequest = question(organization, "bob", APPROVE);
    let answer = PermissionServiceClient::with_interceptor(channel, credential)
        .check_permission(asked)
        .await;
    match answer {
        Ok(answer) => format!("allowed: {}", answer.into_inner().allowed),
        refused => refusal(&refused.map(drop)),
    }
}

#[tokio::test]
async fn a_certificate_lets_in_as_far_as_its_grant_goes() {
    let authority = Authority::new();
    let issued = authority.server(&["127.0.0.1"], Validity::Now);
    let files = Files::new(&issued, Some(&authority.pem));
    let grants = format!(
        "[[grant]]\ncertificate = \"spiffe://district/web\"\nscopes = [\"check\"]\norganizations = [\"{}\"]\n
         [[grant]]\ncertificate = \"reports.district.example\"\nscopes = [\"list\"]\norganizations = \"all\"",
        id("lincoln")
    );
    let certificates = Certificates::new(&Grants::parse(&grants).unwrap());
    let database = Database::create().await;
    fill(&database.client().await).await;
    let config = Config {
        authenticator: Arc::new(Authenticator::default().with_certificates(certificates)),
        tls: Some(Arc::new(files.load())),
        ..config(&database.url)
    };
    let mut server = Server::listening_tls(config, authority.believed()).await;
    server.ready().await;
    let client = |uris: &[&str], names: &[&str]| ClientTls {
        identity: Some(authority.client(uris, names, Validity::Now).identity()),
        ..authority.believed()
    };
    let web = || client(&["spiffe://district/web"], &[]);
    let cases = [
        (web(), None, "lincoln", "allowed: true"),
        (web(), None, "franklin", "ORGANIZATION_NOT_ALLOWED"),
        (web(), None, "nowhere", "ORGANIZATION_NOT_ALLOWED"),
        (
            client(&[], &["reports.district.example"]),
            None,
            "lincoln",
            "SCOPE_MISSING",
        ),
        (
            client(&["spiffe://district/other"], &[]),
            None,
            "lincoln",
            "SCOPE_MISSING",
        ),
        // A URI that could pass for another's DNS name is no name.
        (
            client(&["reports.district.example"], &[]),
            None,
            "lincoln",
            "CREDENTIAL_MISSING",
        ),
        (authority.believed(), None, "lincoln", "CREDENTIAL_MISSING"),
        // What is sent must be right, too.
        (web(), Some("hp_a_b"), "lincoln", "CREDENTIAL_INVALID"),
    ];
    for (tls, token, organization, expected) in cases {
        let found = said(&server.endpoint, tls, token, organization).await;
        assert_eq!(found, expected, "{organization} {token:?}");
    }
}
