//! The settings of TLS, for those who call.

use std::{path::PathBuf, time::Duration};

use clap::Args;

/// A certificate that was renewed is in use this soon; three small files are read for it.
pub const TLS_RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Where the service's certificate is, and whose certificates of clients it believes.
#[derive(Args, Clone, Debug)]
pub struct TlsSettings {
    /// Serve TLS with this certificate and those that lead to its authority: a PEM file, read again when it changes
    #[arg(long, env = "HALLPASS_TLS_CERTIFICATE", requires = "tls_key")]
    pub tls_certificate: Option<PathBuf>,

    /// The certificate's private key: a PEM file
    #[arg(long, env = "HALLPASS_TLS_KEY", requires = "tls_certificate")]
    pub tls_key: Option<PathBuf>,

    /// Ask clients for certificates of these authorities: a PEM file. Who has none may come with another credential
    #[arg(long, env = "HALLPASS_TLS_CLIENT_CA", requires = "tls_certificate")]
    pub tls_client_ca: Option<PathBuf>,
}
