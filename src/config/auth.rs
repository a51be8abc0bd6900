//! How callers are told: `--auth`, and what belongs to it.
//!
//! Invariant: a service that asks for no credential can be reached from its own machine alone.

use std::{path::PathBuf, str::FromStr};

use clap::Args;

use super::{IdentitySettings, ListenAddress};

/// A way in which callers say who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// They do not: whoever can reach the service may ask everything.
    None,
    ApiKey,
    Jwt,
    Mtls,
}

impl AuthMethod {
    const ALL: [(&'static str, Self); 4] = [
        ("none", Self::None),
        ("api-key", Self::ApiKey),
        ("jwt", Self::Jwt),
        ("mtls", Self::Mtls),
    ];
}

impl FromStr for AuthMethod {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, method)| *method).ok_or_else(|| {
            format!(
                "must be of: {}",
                Self::ALL.map(|(known, _)| known).join(", ")
            )
        })
    }
}

/// Who may call.
#[derive(Args, Clone, Debug)]
pub struct AuthSettings {
    /// How callers say who they are: any of api-key, jwt, mtls, with commas between; or none, on loopback and Unix sockets
    #[arg(
        long,
        env = "HALLPASS_AUTH",
        default_value = "none",
        value_delimiter = ','
    )]
    pub auth: Vec<AuthMethod>,

    #[command(flatten)]
    pub pepper: PepperSettings,

    #[command(flatten)]
    pub identity: IdentitySettings,
}

/// What goes into the hash of each API key and is not in the database.
#[derive(Args, Clone, Debug)]
pub struct PepperSettings {
    /// A file with a secret of the service's own: without it, whoever can write the table of API keys can make one
    #[arg(long, env = "HALLPASS_API_KEY_PEPPER_FILE")]
    pub api_key_pepper_file: Option<PathBuf>,
}

impl AuthSettings {
    /// Whether callers are let in without a credential.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.auth.contains(&AuthMethod::None)
    }

    #[must_use]
    pub fn accepts(&self, method: AuthMethod) -> bool {
        self.auth.contains(&method)
    }

    /// What must hold of the settings together, and of where the service listens.
    ///
    /// # Errors
    /// Says what does not.
    pub fn check<'a>(
        &self,
        mut listens: impl Iterator<Item = (&'static str, &'a ListenAddress)>,
    ) -> Result<(), String> {
        if self.is_open() && self.auth.iter().any(|method| *method != AuthMethod::None) {
            return Err(
                "--auth none lets everybody in: leave it out beside another way".to_owned(),
            );
        }
        let public = listens.find(|(_, address)| !address.is_local());
        if let (true, Some((setting, _))) = (self.is_open(), public) {
            return Err(format!(
                "{setting} can be reached from other machines, and --auth is none: say who may call, for example \
                 with --auth api-key, or use a loopback address or unix:PATH"
            ));
        }
        let jwt = self.identity.jwt()?;
        if self.accepts(AuthMethod::Jwt) && jwt.is_none() {
            return Err("--auth jwt needs --jwt-issuer, --jwt-audience and --jwt-jwks".to_owned());
        }
        if !self.accepts(AuthMethod::Jwt) && jwt.is_some() {
            return Err("--jwt-issuer is of no use without --auth jwt".to_owned());
        }
        let needs_grants = self.accepts(AuthMethod::Jwt) || self.accepts(AuthMethod::Mtls);
        if needs_grants && self.identity.grants.is_none() {
            return Err(
                "--auth jwt and --auth mtls need --grants, which says what their callers may do"
                    .to_owned(),
            );
        }
        if !needs_grants && self.identity.grants.is_some() {
            return Err("--grants is of no use without --auth jwt or --auth mtls".to_owned());
        }
        if !self.accepts(AuthMethod::ApiKey) && self.pepper.api_key_pepper_file.is_some() {
            return Err("--api-key-pepper-file is of no use without --auth api-key".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_open_is_local_and_nothing_else() {
        let cases = [
            ("127.0.0.1:1", "none", true),
            ("unix:/x", "none", true),
            ("0.0.0.0:1", "none", false),
            ("0.0.0.0:1", "api-key", true),
            ("127.0.0.1:1", "api-key", true),
            ("127.0.0.1:1", "api-key,none", false),
            ("127.0.0.1:1", "none,api-key", false),
            ("127.0.0.1:1", "none,none", true),
        ];
        for (listen, auth, is_fine) in cases {
            let settings = AuthSettings {
                auth: auth.split(',').map(|name| name.parse().unwrap()).collect(),
                pepper: PepperSettings {
                    api_key_pepper_file: None,
                },
                identity: IdentitySettings {
                    jwt_issuer: None,
                    jwt_audience: None,
                    jwt_jwks: None,
                    jwt_jwks_ca: None,
                    jwt_leeway: Duration::ZERO,
                    grants: None,
                },
            };
            let address = listen.parse().unwrap();
            let checked = settings.check([("--grpc-listen", &address)].into_iter());
            assert_eq!(checked.is_ok(), is_fine, "{listen} {auth}: {checked:?}");
        }
    }

    #[test]
    fn ways_are_named_exactly() {
        for wrong in ["", "None", "apikey", "api-key ", "api_key", "key"] {
            assert!(wrong.parse::<AuthMethod>().is_err(), "{wrong}");
        }
    }
}
