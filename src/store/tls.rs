//! TLS to PostgreSQL: libpq's `sslmode`, `sslrootcert`, `sslcert` and `sslkey`, out of the URL and into rustls.
//!
//! Invariant: nothing is weaker than the URL says. What contradicts itself is refused, a file that cannot be read too,
//! and a server on another machine is verified in full unless the URL asks for less. Files are read once, when the URL
//! is parsed.

mod options;

use std::{fs::File, io, io::Read, net::IpAddr, str::FromStr, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{
        CryptoProvider, aws_lc_rs::default_provider, verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use tokio_postgres::{
    Config,
    config::{Host, SslMode},
};
use tokio_postgres_rustls::MakeRustlsConnect;

pub(super) use self::options::Options;

/// Bytes of a file with certificates. The bundle of all public authorities is a twentieth of it.
const PEM_BYTES_MAX: u64 = 4 << 20;

/// PostgreSQL from 17 on insists on it where the handshake comes first (`sslnegotiation=direct`); others overlook it.
const ALPN: &[u8] = b"postgresql";

/// The authorities that this machine trusts, as libpq names them.
const SYSTEM_ROOTS: &str = "system";

/// How tokio-postgres goes on where a server has no TLS; it shows this in no other way.
const NO_TLS: &str = "server does not support TLS";

/// What is asked of the server, from nothing to everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Disable,
    /// Encrypted if the server can, whoever it is.
    Prefer,
    /// Encrypted, whoever it is.
    Require,
    /// The certificate is of one of our authorities, whatever its name.
    VerifyCa,
    /// And for the host that the URL names.
    VerifyFull,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "disable" => Ok(Self::Disable),
            "prefer" => Ok(Self::Prefer),
            "require" => Ok(Self::Require),
            "verify-ca" => Ok(Self::VerifyCa),
            "verify-full" => Ok(Self::VerifyFull),
            other => Err(format!(
                "sslmode=`{}`: must be disable, prefer, require, verify-ca or verify-full",
                other.escape_debug()
            )),
        }
    }
}

impl Options {
    /// What is asked of the servers that `config` names.
    pub(super) fn mode(&self, config: &Config) -> Result<Mode, String> {
        let named: Option<Mode> = self.mode.as_deref().map(str::parse).transpose()?;
        if is_on_sockets(config) {
            // PostgreSQL has no TLS there; libpq overlooks what is said, too.
            return Ok(Mode::Disable);
        }
        let mode = match (named, &self.root) {
            (None, None) if is_on_this_machine(config) => Mode::Prefer,
            (None, _) => Mode::VerifyFull,
            // As in libpq: whoever names an authority means it.
            (Some(Mode::Require), Some(_)) => Mode::VerifyCa,
            (Some(Mode::Disable | Mode::Prefer), Some(_)) => {
                return Err(
                    "sslrootcert needs sslmode=verify-ca or verify-full: this one verifies nothing"
                        .to_owned(),
                );
            }
            (Some(Mode::VerifyCa), None) => {
                return Err("sslmode=verify-ca needs sslrootcert=FILE".to_owned());
            }
            (Some(named), _) => named,
        };
        // Any of them certifies whoever asks.
        if mode != Mode::VerifyFull && self.root.as_deref() == Some(SYSTEM_ROOTS) {
            return Err("sslrootcert=system needs sslmode=verify-full".to_owned());
        }
        Ok(mode)
    }

    /// What opens connections in this mode.
    pub(super) fn connector(&self, mode: Mode) -> Result<MakeRustlsConnect, String> {
        let provider = Arc::new(default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let whoever_has = |roots| {
            let verifier = AnyName { roots, provider };
            Arc::new(verifier)
        };
        let builder = match mode {
            Mode::VerifyFull => builder.with_root_certificates(self.roots()?),
            Mode::VerifyCa => builder
                .dangerous()
                .with_custom_certificate_verifier(whoever_has(Some(self.roots()?))),
            Mode::Disable | Mode::Prefer | Mode::Require => builder
                .dangerous()
                .with_custom_certificate_verifier(whoever_has(None)),
        };
        let mut config = match (&self.certificate, &self.key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(certificate), Some(key)) => builder
                .with_client_auth_cert(certificates("sslcert", certificate)?, private_key(key)?)
                .map_err(|error| format!("sslcert and sslkey: {error}"))?,
            _ => return Err("sslcert and sslkey must be given together".to_owned()),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(MakeRustlsConnect::new(config))
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let found = match self.root.as_deref() {
            None | Some(SYSTEM_ROOTS) => rustls_native_certs::load_native_certs().certs,
            Some(path) => certificates("sslrootcert", path)?,
        };
        let mut roots = RootCertStore::empty();
        if self.root.as_deref().is_none_or(|root| root == SYSTEM_ROOTS) {
            // A machine may hold some that rustls does not know how to read.
            roots.add_parsable_certificates(found);
        } else {
            for root in found {
                roots
                    .add(root)
                    .map_err(|error| format!("sslrootcert: {error}"))?;
            }
        }
        if roots.is_empty() {
            return Err(
                "no trusted authority on this machine: name one with sslrootcert=FILE".to_owned(),
            );
        }
        Ok(roots)
    }
}

/// How tokio-postgres is told of a mode. Verification is the connector's.
pub(super) fn ssl_mode(mode: Mode) -> SslMode {
    match mode {
        Mode::Disable => SslMode::Disable,
        Mode::Prefer => SslMode::Prefer,
        Mode::Require | Mode::VerifyCa | Mode::VerifyFull => SslMode::Require,
    }
}

/// Whether a connection failed because of who the server is, or what it takes of us: trying again does not help.
pub(super) fn is_refusal(error: &tokio_postgres::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let inner = cause
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
            .and_then(|inner| inner.downcast_ref());
        match inner.or_else(|| cause.downcast_ref()) {
            Some(
                Error::InvalidCertificate(_)
                | Error::AlertReceived(_)
                | Error::PeerIncompatible(_)
                | Error::NoApplicationProtocol,
            ) => return true,
            _ if cause.to_string() == NO_TLS => return true,
            _ => source = cause.source(),
        }
    }
    false
}

fn is_on_sockets(config: &Config) -> bool {
    let is_socket = |host: &Host| matches!(host, Host::Unix(_));
    config.get_hostaddrs().is_empty() && config.get_hosts().iter().all(is_socket)
}

/// Whether nothing goes over a network. `hostaddr` says where a connection goes, whatever the host is called.
fn is_on_this_machine(config: &Config) -> bool {
    let addresses = config.get_hostaddrs();
    let is_local = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
        }
    };
    if addresses.is_empty() {
        config.get_hosts().iter().all(is_local)
    } else {
        addresses.iter().all(IpAddr::is_loopback)
    }
}

fn certificates(option: &str, path: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let unusable = |why: &dyn std::fmt::Display| unusable(option, path, why);
    let pem = read(path).map_err(|error| unusable(&error))?;
    let found = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if found.is_empty() => Err(unusable(&"holds no certificate in PEM form")),
        Ok(found) => Ok(found),
        Err(error) => Err(unusable(&error)),
    }
}

fn private_key(path: &str) -> Result<PrivateKeyDer<'static>, String> {
    let pem = read(path).map_err(|error| unusable("sslkey", path, &error))?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| unusable("sslkey", path, &error))
}

fn unusable(option: &str, path: &str, why: &dyn std::fmt::Display) -> String {
    format!("{option}=`{}`: {why}", path.escape_debug())
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(PEM_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Takes a certificate whatever its name: any at all, or any that one of `roots` answers for.
///
/// That the server holds the key of its certificate is always verified: channel binding leans on it.
#[derive(Debug)]
struct AnyName {
    roots: Option<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(roots) = &self.roots {
            verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(end_entity)?,
                roots,
                intermediates,
                now,
                self.provider.signature_verification_algorithms.all,
            )?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a URL asks for, or why it is refused.
    fn asked(url: &str) -> Result<Mode, String> {
        let (rest, options) = Options::take_from(url);
        options.mode(&rest.parse().map_err(|error| format!("{error:?}"))?)
    }

    #[test]
    fn a_url_says_what_is_asked_of_the_server() {
        use Mode::{Disable, Prefer, Require, VerifyCa, VerifyFull};
        let cases = [
            // Nothing said.
            ("postgresql://u@db.example/d", VerifyFull),
            ("postgresql://u@10.0.0.1/d", VerifyFull),
            ("postgresql://u@localhost/d", Prefer),
            ("postgresql://u@[::1]/d", Prefer),
            ("postgresql://u@127.0.0.1,db.example/d", VerifyFull),
            ("postgresql://u@localhost/d?hostaddr=10.0.0.1", VerifyFull),
            ("postgresql://u@db.example/d?hostaddr=127.0.0.9", Prefer),
            ("postgresql://u@localhost/d?sslrootcert=ca.pem", VerifyFull),
            ("postgresql:///d?host=/run/postgresql&user=u", Disable),
            // libpq's names and meanings.
            ("postgresql://u@db.example/d?sslmode=disable", Disable),
            ("postgresql://u@db.example/d?sslmode=prefer", Prefer),
            ("postgresql://u@db.example/d?sslmode=require", Require),
            (
                "postgresql://u@db.example/d?sslmode=require&sslrootcert=ca.pem",
                VerifyCa,
            ),
            (
                "postgres://u@db.example?sslrootcert=ca.pem&sslmode=verify-ca&user=v",
                VerifyCa,
            ),
            ("postgres://u@localhost?sslmode=verify-full", VerifyFull),
            (
                "postgres://u@h?sslmode=verify-full&sslrootcert=system",
                VerifyFull,
            ),
            ("postgres://u@h?ssl%6Dode=verify%2Dfull", VerifyFull),
            ("postgres://u@h?sslmode=disable&sslmode=require", Require),
            (
                "postgresql:///d?host=/tmp&user=u&sslmode=verify-full",
                Disable,
            ),
            // A password is no place for parameters.
            ("postgres://u:a?sslmode=disable@h", VerifyFull),
            ("postgres://u:a?b@h/d?sslmode=require", Require),
            // The other form.
            ("host=db.example user=u", VerifyFull),
            ("host=db.example user=u sslmode=require", Require),
            ("sslmode = 'require' host=h user=u", Require),
            ("host=h sslmode=dis\\able user=u", Disable),
            ("host=h user=u password='a sslmode=disable'", VerifyFull),
            ("host=h user=u password='a\\' sslmode=disable'", VerifyFull),
            ("host=/tmp user=u sslmode=require", Disable),
        ];
        for (url, mode) in cases {
            assert_eq!(asked(url), Ok(mode), "{url}");
        }
    }

    #[test]
    fn what_contradicts_itself_or_is_unknown_is_refused() {
        let cases = [
            ("postgres://u@h?sslmode=allow", "sslmode=`allow`"),
            (
                "postgres://u@h?sslmode=Verify-Full",
                "sslmode=`Verify-Full`",
            ),
            ("postgres://u@h?sslmode=", "sslmode=``"),
            ("postgres://u@h?sslmode=verify-ca", "needs sslrootcert"),
            (
                "postgres://u@h?sslmode=prefer&sslrootcert=a",
                "verifies nothing",
            ),
            (
                "postgres://u@h?sslmode=disable&sslrootcert=a",
                "verifies nothing",
            ),
            (
                "postgres://u@h?sslmode=require&sslrootcert=system",
                "needs sslmode=verify-full",
            ),
            (
                "postgres://u@h?sslmode=verify-ca&sslrootcert=system",
                "needs sslmode=verify-full",
            ),
            ("postgres://u@h?sslcrl=a", "sslcrl"),
            ("host=h user=u sslmode=any", "sslmode=`any`"),
            ("host=h user=u sslmode", "unexpected EOF"),
        ];
        for (url, complaint) in cases {
            let refused = asked(url).unwrap_err();
            assert!(refused.contains(complaint), "{url}: {refused}");
        }
    }
}
