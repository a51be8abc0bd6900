//! Makes, from the settings, what tells callers; whatever is wrong with what they name is said before anything starts.

use std::{fs::File, io::Read, path::Path};

use anyhow::{Context, Error, anyhow, ensure};

use crate::{
    auth::{
        Authenticator,
        api_key::Pepper,
        certificates::Certificates,
        grants::Grants,
        keys::{ApiKeys, Timing},
        tokens::{KeySource, LEEWAY_MAX, Pace, TokenRules, Tokens, shown},
    },
    config::{AuthMethod, IdentitySettings, KEY_USE_INTERVAL, PepperSettings, ServeSettings},
};

/// Fewer bytes could be guessed; `openssl rand -hex 32` gives 64 characters.
const PEPPER_BYTES_MIN: u64 = 32;

/// More is another file, named by mistake.
const PEPPER_BYTES_MAX: u64 = 4_096;

pub(super) fn authenticator(settings: &ServeSettings) -> anyhow::Result<Authenticator> {
    if settings.auth.is_open() {
        return Ok(Authenticator::open());
    }
    let mut authenticator = Authenticator::default();
    if settings.auth.accepts(AuthMethod::ApiKey) {
        let timing = Timing {
            staleness_bound: settings.staleness_bound,
            staleness_ceiling: settings.staleness_ceiling,
            record_interval: KEY_USE_INTERVAL,
        };
        let pepper = read_pepper(&settings.auth.pepper)?;
        authenticator = authenticator.with_keys(ApiKeys::new(timing, pepper));
    }
    let identity = &settings.auth.identity;
    let Some(path) = &identity.grants else {
        return Ok(authenticator);
    };
    let grants = Grants::read(path);
    let grants = grants.map_err(|error| anyhow!("--grants {}: {error}", path.display()))?;
    if settings.auth.accepts(AuthMethod::Mtls) {
        authenticator = authenticator.with_certificates(Certificates::new(&grants));
    }
    Ok(match tokens(identity, grants)? {
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
        source.map_err(|error| anyhow!("--jwt-jwks `{}`: {error}", shown(jwks).escape_debug()))?;
    let rules = TokenRules {
        issuer: issuer.to_owned(),
        audience: audience.to_owned(),
        leeway,
        grants,
    };
    Ok(Some(Tokens::new(rules, source, Pace::default())))
}

/// The pepper for API keys: the file's bytes, without the line's end that editors add.
pub(super) fn read_pepper(settings: &PepperSettings) -> anyhow::Result<Pepper> {
    let Some(path) = &settings.api_key_pepper_file else {
        return Ok(Pepper::default());
    };
    let bytes = read(path).with_context(|| format!("--api-key-pepper-file {}", path.display()))?;
    Ok(Pepper::new(bytes.trim_ascii_end().to_owned()))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(PEPPER_BYTES_MAX + 1)
        .read_to_end(&mut bytes)?;
    let len = bytes.trim_ascii_end().len() as u64;
    ensure!(
        (PEPPER_BYTES_MIN..=PEPPER_BYTES_MAX).contains(&len),
        "must hold {PEPPER_BYTES_MIN} to {PEPPER_BYTES_MAX} bytes"
    );
    Ok(bytes)
}
