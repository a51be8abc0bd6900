//! The settings of HTTP, their defaults and why.

use clap::{Args, builder::NonEmptyStringValueParser};
use http::{HeaderValue, Uri};

/// Who forgets to say so is not told that a service in use is one to play with.
const DEFAULT_ENVIRONMENT: &str = "production";

/// What HTTP alone has.
#[derive(Args, Clone, Debug)]
pub struct HttpSettings {
    /// What /api/health says of where the service runs
    #[arg(long, env = "HALLPASS_ENVIRONMENT", default_value = DEFAULT_ENVIRONMENT, value_parser = NonEmptyStringValueParser::new())]
    pub environment: String,

    /// Origins whose pages may call from a browser, separated by commas: `https://admin.example.org`; by default none
    #[arg(long, env = "HALLPASS_CORS_ORIGINS", value_delimiter = ',', value_parser = parse_origin)]
    pub cors_origins: Vec<HeaderValue>,
}

/// An origin as browsers send it: a scheme, a host in lower case, and a port unless it is the scheme's own.
fn parse_origin(text: &str) -> Result<HeaderValue, String> {
    let not_an_origin = || {
        "not an origin: http:// or https://, a host in lower case, and a port unless it is the scheme's own".to_owned()
    };
    let uri: Uri = text.parse().map_err(|_| not_an_origin())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(not_an_origin());
    };
    let has_own_port = match authority.port_u16() {
        Some(80) => scheme == "http",
        Some(443) => scheme == "https",
        _ => false,
    };
    let written = format!("{scheme}://{authority}");
    let is_origin = matches!(scheme, "http" | "https")
        && !has_own_port
        && !authority.as_str().contains(['@', '*'])
        && written == text
        && text == text.to_ascii_lowercase();
    if !is_origin {
        return Err(not_an_origin());
    }
    HeaderValue::from_str(text).map_err(|_| not_an_origin())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_as_browsers_send_them() {
        for origin in [
            "https://admin.example.org",
            "http://localhost:3000",
            "https://[2001:db8::1]:8443",
        ] {
            assert_eq!(
                parse_origin(origin).as_ref().map(|o| o.as_bytes()),
                Ok(origin.as_bytes())
            );
        }
        for wrong in [
            "",
            "*",
            "null",
            "admin.example.org",
            "https://",
            "https://*.example.org",
            "https://admin.example.org/",
            "https://admin.example.org/page",
            "https://Admin.example.org",
            "https://user@admin.example.org",
            "https://admin.example.org:443",
            "ftp://admin.example.org",
        ] {
            assert!(parse_origin(wrong).is_err(), "{wrong}");
        }
    }
}
