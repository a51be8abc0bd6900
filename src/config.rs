//! Every setting of the service, its default and why; parsed whole before anything is started.

mod auth;
mod connections;
mod http;
mod identity;
mod limits;
mod tls;
mod traces;

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, builder::NonEmptyStringValueParser};

pub use self::{
    auth::{AuthMethod, AuthSettings, PepperSettings},
    connections::ConnectionSettings,
    http::HttpSettings,
    identity::IdentitySettings,
    limits::LimitSettings,
    tls::{TLS_RELOAD_INTERVAL, TlsSettings},
    traces::TraceSettings,
};

/// Where clients look first, and nobody else can reach.
pub const DEFAULT_GRPC_LISTEN: &str = "127.0.0.1:50051";

/// HTTP for the application's own pages and middleware, on the same machine.
pub const DEFAULT_HTTP_LISTEN: &str = "127.0.0.1:8080";

/// Metrics and probes, where Prometheus on the same machine looks.
pub const DEFAULT_OPS_LISTEN: &str = "127.0.0.1:9090";

/// Where the private PostgreSQL lives, beside whatever is being developed.
pub const DEFAULT_DATA_DIR: &str = ".hallpass";

/// Ten polls of the log may be lost before answers come from the database instead.
const DEFAULT_STALENESS_BOUND: &str = "2s";

/// As long as a failover by hand takes, and as a revocation may at the very worst go unheard.
const DEFAULT_STALENESS_CEILING: &str = "5m";

/// A large district a hundred times over.
const DEFAULT_CACHE_CAPACITY: u64 = 1_000_000;

/// Longer than a warm start of 100,000 members, shorter than an orchestrator's patience.
const DEFAULT_WARM_UP_MAX: &str = "10s";

/// The matrix serves dashboards and warm starts; half a minute old is young for both.
const DEFAULT_MATRIX_REFRESH_INTERVAL: &str = "30s";

/// As long as a load balancer needs to see that health has changed.
const DEFAULT_LAME_DUCK: &str = "1s";

/// How long a change can go past disabled triggers unnoticed.
pub const INSPECTION_INTERVAL: Duration = Duration::from_secs(60);

/// The audit log is evidence: nothing goes unless somebody says so.
const DEFAULT_AUDIT_RETENTION_DAYS: u16 = 0;

/// How often the database is sampled for the metrics: as often as Prometheus asks, as a rule.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(15);

/// How often partitions are made ahead and retention is applied; both are a matter of months.
pub const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);

/// How often it is recorded which API keys were used: to tell which are in use, a minute is exact enough.
pub const KEY_USE_INTERVAL: Duration = Duration::from_secs(60);

/// How long calls under way may take to end once the service stops.
pub const DRAIN_MAX: Duration = Duration::from_secs(10);

/// The settings of `hallpass serve` and `hallpass demo`.
#[derive(Args, Clone, Debug)]
pub struct ServeSettings {
    /// Read settings from this TOML file, too: docs/settings.md
    #[arg(long, env = "HALLPASS_CONFIG")]
    pub config: Option<PathBuf>,

    /// Where to serve gRPC: HOST:PORT, the host an IP address or localhost, or unix:PATH
    #[arg(long, env = "HALLPASS_GRPC_LISTEN", default_value = DEFAULT_GRPC_LISTEN)]
    pub grpc_listen: ListenAddress,

    /// Where to serve HTTP and JSON: as --grpc-listen, or none
    #[arg(long, env = "HALLPASS_HTTP_LISTEN", default_value = DEFAULT_HTTP_LISTEN)]
    pub http_listen: MaybeListen,

    /// Where to serve metrics, /livez and /readyz to operators: as --grpc-listen, or none
    #[arg(long, env = "HALLPASS_OPS_LISTEN", default_value = DEFAULT_OPS_LISTEN)]
    pub ops_listen: MaybeListen,

    #[command(flatten)]
    pub http: HttpSettings,

    #[command(flatten)]
    pub auth: AuthSettings,

    /// Answer from the cache only while it is known to be true as of this long ago
    #[arg(long, env = "HALLPASS_STALENESS_BOUND", default_value = DEFAULT_STALENESS_BOUND, value_parser = parse_duration)]
    pub staleness_bound: Duration,

    /// The most that callers may ask for as max_staleness, to be answered through an outage of the database
    #[arg(long, env = "HALLPASS_STALENESS_CEILING", default_value = DEFAULT_STALENESS_CEILING, value_parser = parse_duration)]
    pub staleness_ceiling: Duration,

    /// Users remembered at most, each counted once an organization
    #[arg(long, env = "HALLPASS_CACHE_CAPACITY", default_value_t = DEFAULT_CACHE_CAPACITY)]
    pub cache_capacity: u64,

    /// Be ready after this long even if the cache is not warm
    #[arg(long, env = "HALLPASS_WARM_UP_MAX", default_value = DEFAULT_WARM_UP_MAX, value_parser = parse_duration)]
    pub warm_up_max: Duration,

    /// Refresh the materialized views no more often than this
    #[arg(long, env = "HALLPASS_MATRIX_REFRESH_INTERVAL", default_value = DEFAULT_MATRIX_REFRESH_INTERVAL, value_parser = parse_duration)]
    pub matrix_refresh_interval: Duration,

    /// Remove what is older from the audit log and the log; 0 keeps everything
    #[arg(long, env = "HALLPASS_AUDIT_RETENTION_DAYS", default_value_t = DEFAULT_AUDIT_RETENTION_DAYS, value_parser = clap::value_parser!(u16).range(..=36_500))]
    pub audit_retention_days: u16,

    /// After SIGTERM, say NOT_SERVING for this long before turning callers away
    #[arg(long, env = "HALLPASS_LAME_DUCK", default_value = DEFAULT_LAME_DUCK, value_parser = parse_duration)]
    pub lame_duck: Duration,

    #[command(flatten)]
    pub tls: TlsSettings,

    #[command(flatten)]
    pub connections: ConnectionSettings,

    #[command(flatten)]
    pub limits: LimitSettings,

    #[command(flatten)]
    pub traces: TraceSettings,
}

/// What SIGHUP changes in a service that runs.
pub const RELOADABLE: [&str; 5] = [
    "log-level",
    "caller-rate-max",
    "caller-list-rate-max",
    "address-rate-max",
    "credential-rate-max",
];

impl ServeSettings {
    /// What must hold of the settings together.
    ///
    /// # Errors
    /// Says what does not.
    pub fn check(&self) -> Result<(), String> {
        if self.staleness_ceiling < self.staleness_bound {
            return Err(format!(
                "--staleness-ceiling ({:?}) must not be less than --staleness-bound ({:?})",
                self.staleness_ceiling, self.staleness_bound
            ));
        }
        if matches!(self.grpc_listen, ListenAddress::Unix(_)) {
            if self.auth.accepts(AuthMethod::Mtls) {
                return Err(
                    "--auth mtls is of no use on a Unix socket, which has no TLS".to_owned(),
                );
            }
            if self.tls.tls_certificate.is_some() {
                return Err(
                    "--tls-certificate is of no use on a Unix socket, which has no TLS".to_owned(),
                );
            }
        }
        if self.tls.tls_client_ca.is_some() && !self.auth.accepts(AuthMethod::Mtls) {
            return Err("--tls-client-ca is of no use without --auth mtls".to_owned());
        }
        if self.auth.accepts(AuthMethod::Mtls) && self.tls.tls_client_ca.is_none() {
            return Err(
                "--auth mtls needs --tls-client-ca, which says whose certificates are good"
                    .to_owned(),
            );
        }
        if self.traces.otlp_endpoint.is_none() && !self.traces.otlp_metrics_interval.is_zero() {
            return Err("--otlp-metrics-interval is of no use without --otlp-endpoint".to_owned());
        }
        self.auth.check(self.listens())
    }

    /// Where callers can come in, each with its setting's name.
    pub fn listens(&self) -> impl Iterator<Item = (&'static str, &ListenAddress)> {
        let http = self.http_listen.0.as_ref();
        let ops = self.ops_listen.0.as_ref();
        [
            ("--grpc-listen", Some(&self.grpc_listen)),
            ("--http-listen", http),
            ("--ops-listen", ops),
        ]
        .into_iter()
        .filter_map(|(setting, address)| Some((setting, address?)))
    }
}

/// Which database a command works on.
#[derive(Args, Clone, Debug)]
pub struct DatabaseSettings {
    /// The database, as a libpq URL; without it a private PostgreSQL is started under --data-dir
    #[arg(long, env = "HALLPASS_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<Secret>,

    /// Where the private PostgreSQL lives
    #[arg(long, env = "HALLPASS_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    pub data_dir: PathBuf,
}

/// A setting that may hold a password. It is parsed where it is used: an error of the command line's would print it.
#[derive(Clone)]
pub struct Secret(pub String);

impl From<String> for Secret {
    fn from(secret: String) -> Self {
        Self(secret)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Which service a client command asks.
#[derive(Args, Clone, Debug)]
pub struct ClientSettings {
    /// The service: http://HOST:PORT, https://HOST:PORT or unix:PATH
    #[arg(long, env = "HALLPASS_ENDPOINT", default_value_t = format!("http://{DEFAULT_GRPC_LISTEN}"), value_parser = NonEmptyStringValueParser::new())]
    pub endpoint: String,

    /// What to identify with: an API key, say. Better in the environment, for others may read the command line
    #[arg(long, env = "HALLPASS_TOKEN", hide_env_values = true)]
    pub token: Option<Secret>,

    /// With https, the authorities that the service's certificate may come from: a PEM file; by default those that this
    /// machine trusts
    #[arg(long, env = "HALLPASS_CA_FILE")]
    pub ca_file: Option<PathBuf>,

    /// With https, a certificate to show to the service, and those that lead to its authority: a PEM file
    #[arg(long, env = "HALLPASS_CLIENT_CERTIFICATE", requires = "client_key")]
    pub client_certificate: Option<PathBuf>,

    /// The client certificate's private key: a PEM file
    #[arg(long, env = "HALLPASS_CLIENT_KEY", requires = "client_certificate")]
    pub client_key: Option<PathBuf>,
}

/// Where a service listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(address: &str) -> Result<Self, String> {
        if let Some(path) = address.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        let address = address.replacen("localhost:", "127.0.0.1:", 1);
        let address = address
            .parse()
            .map_err(|_| "not HOST:PORT or unix:PATH".to_owned())?;
        Ok(Self::Tcp(address))
    }
}

impl ListenAddress {
    /// Whether only this machine can reach it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

/// Where a service listens, if it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaybeListen(pub Option<ListenAddress>);

impl FromStr for MaybeListen {
    type Err = String;

    fn from_str(address: &str) -> Result<Self, String> {
        match address {
            "none" => Ok(Self(None)),
            address => address.parse().map(Some).map(Self),
        }
    }
}

const NOT_A_DURATION: &str = "not a duration: a whole number and ms, s, m, h or d";

/// Parses `200ms`, `2s`, `5m`, `1h` or `90d`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis_a_unit: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(NOT_A_DURATION.to_owned()),
    };
    let millis = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(millis_a_unit));
    millis
        .map(Duration::from_millis)
        .ok_or_else(|| NOT_A_DURATION.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_are_local_or_not() {
        let cases = [
            ("127.0.0.1:50051", Some(true)),
            ("localhost:50051", Some(true)),
            ("[::1]:50051", Some(true)),
            ("unix:/run/hallpass.sock", Some(true)),
            ("0.0.0.0:50051", Some(false)),
            ("[::]:50051", Some(false)),
            ("192.168.1.4:50051", Some(false)),
            ("50051", None),
            ("example.org:50051", None),
        ];
        for (address, local) in cases {
            let parsed = address.parse::<ListenAddress>();
            assert_eq!(
                parsed.ok().map(|address| address.is_local()),
                local,
                "{address}"
            );
        }
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        settings: ServeSettings,
    }

    #[test]
    fn settings_that_would_do_nothing_are_refused() {
        const TLS: &str = "--tls-certificate c --tls-key k";
        let cases = [
            (
                format!("{TLS} --tls-client-ca a --auth mtls --grants g"),
                "",
            ),
            (
                format!("{TLS} --tls-client-ca a --auth mtls,api-key --grants g"),
                "",
            ),
            (format!("{TLS} --auth api-key"), ""),
            ("--grpc-listen unix:/s --auth api-key".to_owned(), ""),
            (
                format!("--grpc-listen unix:/s {TLS} --tls-client-ca a --auth mtls --grants g"),
                "--auth mtls is of no use on a Unix socket",
            ),
            (
                "--grpc-listen unix:/s --auth mtls --grants g".to_owned(),
                "--auth mtls is of no use on a Unix socket",
            ),
            (
                format!("--grpc-listen unix:/s {TLS}"),
                "--tls-certificate is of no use on a Unix socket",
            ),
            (
                format!("{TLS} --tls-client-ca a --auth api-key"),
                "--tls-client-ca is of no use without --auth mtls",
            ),
            (
                "--otlp-metrics-interval 10s".to_owned(),
                "--otlp-metrics-interval is of no use without --otlp-endpoint",
            ),
            (
                format!("{TLS} --tls-client-ca a"),
                "--tls-client-ca is of no use without --auth mtls",
            ),
            (
                "--auth mtls --grants g".to_owned(),
                "--auth mtls needs --tls-client-ca",
            ),
        ];
        for (line, expected) in cases {
            let words = ["serve"].into_iter().chain(line.split(' '));
            let line_settings = <Line as clap::Parser>::try_parse_from(words).unwrap();
            match line_settings.settings.check() {
                Ok(()) => assert_eq!(expected, "", "{line}"),
                Err(error) => assert!(
                    !expected.is_empty() && error.starts_with(expected),
                    "{line}: {error}"
                ),
            }
        }
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("200ms"), Ok(Duration::from_millis(200)));
        assert_eq!(parse_duration("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("90d"), Ok(Duration::from_secs(7_776_000)));
        for wrong in ["", "2", "s", "-1s", "2 s", "1.5s", "99999999999999999999s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
