//! Certificates for tests: authorities, what they issue, and the files that a service reads.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use hallpass::server::{Tls, TlsFiles, tls::HTTP2};
use hallpass_client::{ClientIdentity, ClientTls};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType, date_time_ymd,
};
use tempfile::TempDir;

use crate::support::temporary_directory;

/// Short, for nobody here waits for anything else.
const RELOAD_INTERVAL: Duration = Duration::from_millis(20);

/// What issues certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

/// A certificate and its key.
#[derive(Clone)]
pub(crate) struct Issued {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) der: Vec<u8>,
}

/// When a certificate is valid.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validity {
    Now,
    Expired,
    NotYet,
}

impl Authority {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        let name = format!("authority {}", COUNT.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// For a server with these DNS names and addresses.
    pub(crate) fn server(&self, names: &[&str], validity: Validity) -> Issued {
        let params = CertificateParams::new(owned(names)).unwrap();
        self.issue(params, ExtendedKeyUsagePurpose::ServerAuth, validity)
    }

    /// For a client with these URIs, and then these DNS names.
    pub(crate) fn client(&self, uris: &[&str], names: &[&str], validity: Validity) -> Issued {
        let mut params = CertificateParams::new(owned(names)).unwrap();
        for uri in uris {
            let uri = (*uri).try_into().unwrap();
            params.subject_alt_names.push(SanType::URI(uri));
        }
        self.issue(params, ExtendedKeyUsagePurpose::ClientAuth, validity)
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        usage: ExtendedKeyUsagePurpose,
        validity: Validity,
    ) -> Issued {
        params.extended_key_usages = vec![usage];
        (params.not_before, params.not_after) = match validity {
            Validity::Now => (date_time_ymd(2020, 1, 1), date_time_ymd(2120, 1, 1)),
            Validity::Expired => (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1)),
            Validity::NotYet => (date_time_ymd(2120, 1, 1), date_time_ymd(2121, 1, 1)),
        };
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().to_vec(),
        }
    }

    /// Believes this authority alone.
    pub(crate) fn believed(&self) -> ClientTls {
        ClientTls {
            ca: Some(self.pem.clone().into()),
            ..ClientTls::default()
        }
    }
}

impl Issued {
    pub(crate) fn identity(&self) -> ClientIdentity {
        ClientIdentity {
            certificate: self.certificate.clone().into(),
            key: self.key.clone().into(),
        }
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// The files of a service, swapped as Kubernetes swaps those of a secret: all at once, by a symbolic link.
pub(crate) struct Files {
    directory: TempDir,
    pub(crate) paths: TlsFiles,
}

impl Files {
    pub(crate) fn new(server: &Issued, client_ca: Option<&str>) -> Self {
        let directory = temporary_directory();
        let at = |name: &str| directory.path().join("current").join(name);
        let paths = TlsFiles {
            certificate: at("certificate.pem"),
            key: at("key.pem"),
            client_ca: client_ca.map(|_| at("ca.pem")),
        };
        let files = Self { directory, paths };
        files.swap(&server.certificate, &server.key, client_ca);
        files
    }

    pub(crate) fn swap(&self, certificate: &str, key: &str, client_ca: Option<&str>) {
        let root = self.directory.path();
        let generation = root.join(fs::read_dir(root).unwrap().count().to_string());
        fs::create_dir(&generation).unwrap();
        let write = |name: &str, pem: &str| fs::write(generation.join(name), pem).unwrap();
        write("certificate.pem", certificate);
        write("key.pem", key);
        write("ca.pem", client_ca.unwrap_or_default());
        let link = root.join("link");
        symlink(&generation, &link).unwrap();
        fs::rename(link, root.join("current")).unwrap();
    }

    pub(crate) fn load(&self) -> Tls {
        Tls::load(self.paths.clone(), &[HTTP2], RELOAD_INTERVAL).unwrap()
    }
}
