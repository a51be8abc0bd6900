//! The grants file: what is wrong in it is said with its line, and what grants make of a certificate.

use hallpass::auth::{
    Authentication, Authenticator, Identity, Peer,
    access::Need,
    certificates::Certificates,
    grants::Grants,
    tokens::{KeySource, Pace, TokenRules, Tokens},
};
use http::{HeaderMap, header::AUTHORIZATION};

use crate::commands::hallpass;

/// A grant that is right as it is, from its second line on.
const SERVICE: &str = r#"
[[grant]]
claim = "role"
value = "service_role"
scopes = ["check", "list"]
organizations = "all"
"#;

#[test]
fn a_mistake_is_said_with_its_line() {
    let expected = "must be \"all\", a list of hyphenated UUIDs, or { claim = \"NAME\" }";
    let claim = "must be a claim's name, NAME.NAME for one inside another, or a list of such names";
    let scope = "is no scope: check, list, audit, admin, metrics";
    let fields = "is none of claim, value, certificate, scopes, organizations, only_own_user";
    let cases: &[(&str, &str, String)] = &[
        // What is replaced in the grant above, by what, and what is said.
        (
            "claim =",
            "clam =",
            format!("line 2: needs claim and value, or certificate alone; line 3: `clam` {fields}"),
        ),
        ("\"role\"", "\"\"", format!("line 3: claim {claim}")),
        ("\"role\"", "\"a..b\"", format!("line 3: claim {claim}")),
        ("\"role\"", "7", format!("line 3: claim {claim}")),
        ("\"role\"", "[]", format!("line 3: claim {claim}")),
        (
            "\"service_role\"",
            "true",
            "line 4: value must be a string, not empty".into(),
        ),
        (
            "\"service_role\"",
            "\"\"",
            "line 4: value must be a string, not empty".into(),
        ),
        (
            "value = \"service_role\"",
            "",
            "line 2: needs claim and value, or certificate alone".into(),
        ),
        (
            "value =",
            "certificate =",
            "line 2: needs claim and value, or certificate alone".into(),
        ),
        (
            "[\"check\", \"list\"]",
            "[]",
            "line 5: scopes must be a list, not empty".into(),
        ),
        (
            "[\"check\", \"list\"]",
            "\"check\"",
            "line 5: scopes must be a list, not empty".into(),
        ),
        (
            "\"list\"",
            "\"write\\n\"",
            format!("line 5: `write\\n` {scope}"),
        ),
        ("\"list\"", "7", "line 5: a scope must be a string".into()),
        (
            "scopes = [\"check\", \"list\"]",
            "",
            "line 2: scopes is missing".into(),
        ),
        (
            "organizations = \"all\"",
            "",
            "line 2: organizations is missing".into(),
        ),
        (
            "\"all\"",
            "\"ALL\"",
            format!("line 6: organizations {expected}"),
        ),
        (
            "\"all\"",
            "[\"all\"]",
            format!("line 6: organizations {expected}"),
        ),
        (
            "\"all\"",
            "[7]",
            format!("line 6: organizations {expected}"),
        ),
        (
            "\"all\"",
            "[\"6fa459eaee8a3ca4894edb77e160355e\"]",
            format!("line 6: organizations {expected}"),
        ),
        (
            "\"all\"",
            "{ claims = \"a\" }",
            format!("line 6: organizations {expected}"),
        ),
        (
            "\"all\"",
            "{ claim = \"a\", value = \"b\" }",
            format!("line 6: organizations {expected}"),
        ),
        (
            "\"all\"",
            "{ claim = 7 }",
            format!("line 6: organizations: claim {claim}"),
        ),
        (
            "\"all\"",
            "\"all\"\nonly_own_user = \"yes\"",
            "line 7: only_own_user must be true or false".into(),
        ),
        (
            "\"list\"]",
            "\"admin\"]\nonly_own_user = true",
            "line 5: only_own_user goes with check and list, not with `admin`".into(),
        ),
        (
            "\"all\"",
            "\"all\"\n[[grants]]",
            "line 7: `grants`: expected [[grant]]".into(),
        ),
        (
            "[[grant]]",
            "[grant]",
            "line 2: `grant`: expected [[grant]]".into(),
        ),
        (
            "\"all\"",
            "{ claim = 7 }\n[[grant]]\nscopes = \"x\"",
            format!(
                "line 6: organizations: claim {claim}; line 7: needs claim and value, or certificate alone; \
             line 7: organizations is missing; line 8: scopes must be a list, not empty"
            ),
        ),
        (
            "claim = \"role\"\nvalue",
            "only_own_user = true\ncertificate",
            "line 2: only_own_user: a certificate is no user's".into(),
        ),
    ];
    assert_eq!(Grants::parse(SERVICE).map(drop), Ok(()));
    assert_eq!(Grants::parse("").map(drop), Ok(()));
    for (from, to, expected) in cases {
        let text = SERVICE.replacen(from, to, 1);
        assert_ne!(text, SERVICE, "{from}");
        assert_eq!(
            Grants::parse(&text).map(drop),
            Err(expected.clone()),
            "{text}"
        );
    }
    for broken in ["[[grant]", "a = ", "a = 1\na = 2"] {
        let said = Grants::parse(broken).unwrap_err();
        assert!(said.starts_with("line "), "{said}");
    }
}

#[test]
fn grants_of_one_certificate_agree_about_its_organizations() {
    let grant = |scope: &str, organizations: &str| {
        format!(
            "[[grant]]\ncertificate = \"spiffe://district/web\"\nscopes = [\"{scope}\"]\norganizations = {organizations}\n"
        )
    };
    let one = "[\"6fa459ea-ee8a-3ca4-894e-db77e160355e\"]";
    let both = |first, second| Grants::parse(&(grant("check", first) + &grant("list", second)));
    let added = both("\"all\"", "\"all\"").unwrap();
    let caller = &added.certificates()["spiffe://district/web"];
    let scopes: Vec<&str> = caller.scopes.iter().map(|scope| scope.name()).collect();
    assert_eq!(scopes, ["check", "list"]);
    let said = "line 5: `spiffe://district/web` has another grant, for other organizations";
    assert_eq!(both("\"all\"", one).map(drop), Err(said.to_owned()));
    let of_a_claim = Grants::parse(&grant("check", "{ claim = \"org\" }"));
    let said = "line 1: organizations: a certificate has no claims";
    assert_eq!(of_a_claim.map(drop), Err(said.to_owned()));
}

/// `certificate:NAME check` or the error.
fn said(authenticator: &Authenticator, names: &[&str], credential: Option<&str>) -> String {
    let mut headers = HeaderMap::new();
    if let Some(credential) = credential {
        headers.insert(AUTHORIZATION, credential.parse().unwrap());
    }
    let peer = Peer {
        address: None,
        certificate_names: names.iter().map(|name| Box::from(*name)).collect(),
    };
    match authenticator.authenticate(&headers, &peer, Need::Credential) {
        Authentication::Known(Ok(caller)) => {
            let scopes = caller.scopes.iter().map(|scope| scope.name());
            let words: Vec<String> = [caller.identity.to_string()]
                .into_iter()
                .chain(scopes.map(str::to_owned))
                .collect();
            words.join(" ")
        }
        Authentication::Known(Err(error)) => error.to_string(),
        Authentication::Pending(_) => "pending".to_owned(),
        Authentication::Unverified(_) => "unverified".to_owned(),
    }
}

#[test]
fn a_certificate_is_one_caller() {
    const INVALID: &str = "the credential is not valid here";
    const MISSING: &str = "no credential: send `authorization: Bearer <key or token>`";
    let grants = r#"
        [[grant]]
        certificate = "spiffe://district/web"
        scopes = ["check"]
        organizations = "all"
        [[grant]]
        certificate = "web.district.example"
        scopes = ["list"]
        organizations = "all"
    "#;
    let grants = Grants::parse(grants).unwrap();
    let certificates = Authenticator::default().with_certificates(Certificates::new(&grants));
    let web = "spiffe://district/web";
    let cases: &[(&[&str], Option<&str>, &str)] = &[
        (&[web], None, "certificate:spiffe://district/web check"),
        (
            &["other", web],
            None,
            "certificate:spiffe://district/web check",
        ),
        (&[web, web], None, "certificate:spiffe://district/web check"),
        // Which of its names counts must not be guessed.
        (&[web, "web.district.example"], None, INVALID),
        // The whole name, as it is written.
        (
            &["spiffe://district/web/admin"],
            None,
            "certificate:spiffe://district/web/admin",
        ),
        (
            &["spiffe://district"],
            None,
            "certificate:spiffe://district",
        ),
        (
            &["*.district.example"],
            None,
            "certificate:*.district.example",
        ),
        (&["a\nb"], None, r"certificate:a\nb"),
        (&[], None, MISSING),
        // A bearer credential that is wrong is not mended by a certificate.
        (&[web], Some("Bearer hp_x_y"), INVALID),
        (&[web], Some("Bearer x.y.z"), INVALID),
        (&[web], Some("Bearer "), INVALID),
        (&[web], Some("Basic eDp5"), INVALID),
    ];
    for (names, credential, expected) in cases {
        assert_eq!(
            said(&certificates, names, *credential),
            *expected,
            "{names:?}"
        );
    }
    let rules = TokenRules {
        issuer: String::new(),
        audience: String::new(),
        leeway: std::time::Duration::ZERO,
        grants,
    };
    let source = KeySource::new("/nowhere", None).unwrap();
    let both = certificates.with_tokens(Tokens::new(rules, source, Pace::default()));
    assert_eq!(said(&both, &[web], Some("Bearer hp_x_y")), INVALID);
    assert_eq!(said(&both, &[web], Some("Bearer x.y.z")), "unverified");
    assert_eq!(
        said(&both, &[web], None),
        "certificate:spiffe://district/web check"
    );
    assert_eq!(said(&Authenticator::default(), &[web], None), MISSING);
    let name = Identity::Certificate("x".into());
    assert_eq!(name.to_string(), "certificate:x");
}

#[test]
fn keys_come_from_https_this_machine_or_a_file() {
    let cases = [
        ("https://issuer.example/jwks.json", true),
        ("http://127.0.0.1:8080/jwks.json", true),
        ("http://[::1]:8080/jwks.json", true),
        ("http://localhost/jwks.json", true),
        ("/etc/hallpass/jwks.json", true),
        ("jwks.json", true),
        ("http://issuer.example/jwks.json", false),
        ("http://localhost.example/jwks.json", false),
        ("http://127.0.0.1@issuer.example/jwks.json", false),
        ("ftp://127.0.0.1/jwks.json", false),
        ("https://", false),
        ("https://user:secret@issuer.example/jwks.json", false),
        ("https://user@issuer.example/jwks.json", false),
    ];
    for (name, is_source) in cases {
        let source = KeySource::new(name, None);
        assert_eq!(source.is_ok(), is_source, "{name}: {:?}", source.err());
    }
    let source = KeySource::new("https://issuer.example:8443/jwks.json?apikey=secret", None);
    assert_eq!(
        source.unwrap().to_string(),
        "https://issuer.example:8443/jwks.json"
    );
}

#[tokio::test]
async fn serve_says_what_is_wrong_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let right = write("right.toml", SERVICE);
    let wrong = write("wrong.toml", &SERVICE.replace("\"all\"", "7"));
    let empty = write("empty.pem", "");
    let data = directory.path().join("data");
    let jwt = [
        "--auth",
        "jwt",
        "--jwt-issuer",
        "i",
        "--jwt-audience",
        "a",
        "--jwt-jwks",
    ];
    let cases: &[(&[&str], &[&str], &str)] = &[
        (
            &jwt,
            &["k", "--grants", &wrong],
            "wrong.toml: line 6: organizations must be",
        ),
        (
            &jwt,
            &["k", "--grants", "/nowhere.toml"],
            "--grants /nowhere.toml: No such file",
        ),
        (
            &["--jwt-issuer", "i"],
            &[],
            "--jwt-issuer needs --jwt-audience and --jwt-jwks",
        ),
        (
            &["--jwt-issuer", "i", "--jwt-jwks", "k"],
            &[],
            "--jwt-issuer and --jwt-jwks need --jwt-audience",
        ),
        (&jwt, &["k"], "--auth mtls need --grants"),
        (&jwt[2..], &["k"], "of no use without --auth jwt"),
        (&["--auth", "jwt"], &[], "--auth jwt needs --jwt-issuer"),
        (
            &["--auth", "mtls", "--grants", &right],
            &[],
            "--auth mtls needs --tls-client-ca",
        ),
        (
            &["--auth", "mtls", "--grpc-listen", "unix:/nowhere/socket"],
            &[],
            "of no use on a Unix socket, which has no TLS",
        ),
        (
            &["--tls-client-ca", &empty, "--tls-certificate", &empty],
            &["--tls-key", &empty],
            "--tls-client-ca is of no use without --auth mtls",
        ),
        (
            &["--grants", &right],
            &[],
            "--grants is of no use without --auth jwt or --auth mtls",
        ),
        (
            &jwt,
            &["k", "--grants", &right, "--jwt-leeway", "10m"],
            "--jwt-leeway must be at most 300s, not 600s",
        ),
        (
            &jwt,
            &["http://issuer.example/", "--grants", &right],
            "--jwt-jwks `http://issuer.example/`: must be https://",
        ),
        (
            &jwt,
            &[
                "https://u:secret@issuer.example/?secret",
                "--grants",
                &right,
            ],
            "--jwt-jwks `https://issuer.example/`: must not have a user",
        ),
        (
            &jwt,
            &[
                "https://issuer.example/",
                "--grants",
                &right,
                "--jwt-jwks-ca",
                &empty,
            ],
            "holds no certificate",
        ),
    ];
    for (first, rest, expected) in cases {
        let mut arguments = vec!["serve", "--data-dir", data.to_str().unwrap()];
        arguments.extend(first.iter().chain(*rest));
        let ran = hallpass(&arguments).await;
        assert_eq!(ran.code, 2, "{ran:?}");
        let complaint = ran.complaint();
        assert!(
            complaint.len() == 1 && complaint[0].contains(expected),
            "{ran:?}"
        );
        assert!(!data.exists(), "{ran:?}");
    }
}
