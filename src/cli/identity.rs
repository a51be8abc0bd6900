//! Opens what the settings for tokens and certificates name; whatever is wrong with it is said before anything starts.

use anyhow::{Error, anyhow, ensure};

use crate::{
    auth::{
        Authenticator,
        certificates::Certificates,
        grants::Grants,
        tokens::{KeySource, LEEWAY_MAX, Pace, TokenRules, Tokens},
    },
    config::IdentitySettings,
};

/// Lets in whom the settings name; everybody where they name nobody.
pub(super) fn authenticator(settings: &IdentitySettings) -> anyhow::Result<Authenticator> {
    let Some(path) = &settings.grants else {
        let jwt = settings.jwt().map_err(Error::msg)?;
        ensure!(
            jwt.is_none(),
            "--jwt-issuer needs --grants: without one a token may do nothing"
        );
        return Ok(Authenticator::open());
    };
    let grants = Grants::read(path);
    let grants = grants.map_err(|error| anyhow!("--grants {}: {error}", path.display()))?;
    let certificates = Certificates::new(&grants);
    let authenticator = Authenticator::default().with_certificates(certificates);
    Ok(match tokens(settings, grants)? {
        Some(tokens) => authenticator.with_tokens(tokens),
        None => authenticator,
    })
}

/// `None` when the settings name no issuer.
fn tokens(settings: &IdentitySettings, grants: Grants) -> anyhow::Result<Option<Tokens>> {
    let Some((issuer, audience, jwks)) = settings.jwt().map_err(Error::msg)? else {
        return Ok(None);
    };
    let leeway = settings.jwt_leeway;
    ensure!(
        leeway <= LEEWAY_MAX,
        "--jwt-leeway must be at most {LEEWAY_MAX:?}, not {leeway:?}"
    );
    let source = KeySource::new(jwks, settings.jwt_jwks_ca.as_deref());
    let source =
        source.map_err(|error| anyhow!("--jwt-jwks `{}`: {error}", jwks.escape_debug()))?;
    let rules = TokenRules {
        issuer: issuer.to_owned(),
        audience: audience.to_owned(),
        leeway,
        grants,
    };
    Ok(Some(Tokens::new(rules, source, Pace::default())))
}
