//! The service that is loaded: where it is, and what its process has used so far.

use std::{fs, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::{
    config::{ClientSettings, ListenAddress},
    load::{self, Target as Address},
};

/// A service, and what to identify with.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) client: ClientSettings,
    pub(super) address: Address,
    pub(super) token: Option<String>,
    /// Of its process on this machine.
    pub(super) pid: Option<u32>,
}

impl Target {
    pub(super) fn running(client: &ClientSettings, pid: Option<u32>) -> anyhow::Result<Self> {
        let endpoint = &client.endpoint;
        let address = if let Some(address) = endpoint.strip_prefix("http://") {
            Address::Tcp(address.trim_end_matches('/').to_owned())
        } else if let Some(address) = endpoint.strip_prefix("https://") {
            let address = address.trim_end_matches('/').to_owned();
            Address::Tls(address, Arc::new(tls(client)?))
        } else if let Ok(ListenAddress::Unix(path)) = endpoint.parse() {
            Address::Unix(path)
        } else {
            return Err(anyhow!(
                "`{endpoint}` is not http://HOST:PORT, https://HOST:PORT or unix:PATH"
            ));
        };
        Ok(Self {
            client: client.clone(),
            address,
            token: client.token.as_ref().map(|token| token.0.clone()),
            pid,
        })
    }

    /// Of all threads of the service so far; `None` where its process is not known.
    pub(super) fn processor_time(&self) -> anyhow::Result<Option<Duration>> {
        let time = self.pid.map(load::processor_time).transpose();
        time.context("cannot read the service's processor time")
    }

    /// `None` as well where threads have ended meanwhile with more than was spent: the kernel tells no more of them.
    pub(super) fn processor_time_since(
        &self,
        before: Option<Duration>,
    ) -> anyhow::Result<Option<Duration>> {
        let spent = self.processor_time()?.zip(before);
        Ok(spent.and_then(|(now, before)| now.checked_sub(before)))
    }

    /// What the service holds in memory, in bytes.
    pub(super) fn memory(&self) -> anyhow::Result<Option<u64>> {
        let Some(pid) = self.pid else {
            return Ok(None);
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status"))
            .context("cannot read the service's memory")?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().nth(1));
        let kilobytes: u64 = kilobytes.context("no VmRSS")?.parse()?;
        Ok(Some(kilobytes << 10))
    }
}

fn tls(client: &ClientSettings) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = &client.ca_file {
        let pem = CertificateDer::pem_file_iter(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        for certificate in pem {
            roots.add(certificate?)?;
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
