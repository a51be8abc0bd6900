//! Settings for callers who come with a token or a certificate. What they name is opened where they are used.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use super::parse_duration;

/// Clocks that are kept by NTP differ by less.
const DEFAULT_JWT_LEEWAY: &str = "30s";

/// Whose tokens are good here, and what tokens and certificates may do.
#[derive(Args, Clone, Debug)]
pub struct IdentitySettings {
    /// Accept tokens whose `iss` is this: `https://REF.supabase.co/auth/v1` for Supabase
    #[arg(long, env = "HALLPASS_JWT_ISSUER")]
    pub jwt_issuer: Option<String>,

    /// Accept tokens whose `aud` is this, or lists it
    #[arg(long, env = "HALLPASS_JWT_AUDIENCE")]
    pub jwt_audience: Option<String>,

    /// The issuer's public keys, a JSON Web Key Set: an https URL or a file
    #[arg(long, env = "HALLPASS_JWT_JWKS")]
    pub jwt_jwks: Option<String>,

    /// Trust these authorities (PEM) for the URL of the keys, and no others; without it those of the system
    #[arg(long, env = "HALLPASS_JWT_JWKS_CA", requires = "jwt_jwks")]
    pub jwt_jwks_ca: Option<PathBuf>,

    /// How far the issuer's clock may be off, up to 5m
    #[arg(long, env = "HALLPASS_JWT_LEEWAY", default_value = DEFAULT_JWT_LEEWAY, value_parser = parse_duration)]
    pub jwt_leeway: Duration,

    /// What tokens and certificates may do, a TOML file
    #[arg(long, env = "HALLPASS_GRANTS")]
    pub grants: Option<PathBuf>,
}

impl IdentitySettings {
    /// Those of `--jwt-issuer`, `--jwt-audience`, `--jwt-jwks` that are set.
    ///
    /// # Errors
    /// When only some of them are, which leaves it open which tokens are meant.
    pub fn jwt(&self) -> Result<Option<(&str, &str, &str)>, String> {
        let named = [
            ("--jwt-issuer", &self.jwt_issuer),
            ("--jwt-audience", &self.jwt_audience),
            ("--jwt-jwks", &self.jwt_jwks),
        ];
        if let [Some(issuer), Some(audience), Some(jwks)] = named.map(|(_, value)| value.as_deref())
        {
            return Ok(Some((issuer, audience, jwks)));
        }
        let (set, missing): (Vec<_>, Vec<_>) =
            named.into_iter().partition(|(_, value)| value.is_some());
        if set.is_empty() {
            return Ok(None);
        }
        let names = |named: Vec<(&'static str, _)>| {
            let names: Vec<&str> = named.into_iter().map(|(name, _)| name).collect();
            names.join(" and ")
        };
        let verb = if set.len() == 1 { "needs" } else { "need" };
        Err(format!("{} {verb} {}", names(set), names(missing)))
    }
}
