//! The settings of the limits, their defaults and why. 0 switches a limit off.

use std::{net::IpAddr, time::Duration};

use clap::Args;
use ipnet::IpNet;

use super::parse_duration;
use crate::limits::Bounds;

/// More than wait for the database at most, so that cached answers are given beside them; as checks, 100 MB of buffers.
const DEFAULT_REQUESTS_IN_FLIGHT_MAX: usize = 5_000;

/// A twentieth of them. A caller with 10,000 checks a second that take 10 ms each has 100; one that offers more than the
/// database can answer waits for no more than these, and hears of the others at once.
const DEFAULT_CALLER_IN_FLIGHT_MAX: u32 = 250;

/// A service that makes thousands of checks a second has room; one that has lost its mind leaves the others a core.
const DEFAULT_CALLER_RATE_MAX: u32 = 20_000;

/// Lists are for screens and reports, and a few hundred a second keep a core of the database busy.
const DEFAULT_CALLER_LIST_RATE_MAX: u32 = 200;

/// As a caller: behind one address there may be several.
const DEFAULT_ADDRESS_RATE_MAX: u32 = 20_000;

/// Everything that a large deployment starts with at once; as a flood, two percent of a core for the database.
const DEFAULT_CREDENTIAL_RATE_MAX: u32 = 100;

/// Longer than the database may take to answer; what waits longer, nobody waits for.
const DEFAULT_REQUEST_DEADLINE_MAX: &str = "10s";

/// Streams move to other replicas within this time, and those whose client is gone end.
const DEFAULT_STREAM_AGE_MAX: &str = "1h";

/// What one caller, one address and everybody together may have.
#[derive(Args, Clone, Debug)]
pub struct LimitSettings {
    /// Calls under way at most; further ones are refused at once, health is not
    #[arg(long, env = "HALLPASS_REQUESTS_IN_FLIGHT_MAX", default_value_t = DEFAULT_REQUESTS_IN_FLIGHT_MAX)]
    pub requests_in_flight_max: usize,

    /// Calls under way of one caller at most; of one address where --auth is none
    #[arg(long, env = "HALLPASS_CALLER_IN_FLIGHT_MAX", default_value_t = DEFAULT_CALLER_IN_FLIGHT_MAX)]
    pub caller_in_flight_max: u32,

    /// Checks a second of one caller at most; ten items of a batch count as one
    #[arg(long, env = "HALLPASS_CALLER_RATE_MAX", default_value_t = DEFAULT_CALLER_RATE_MAX)]
    pub caller_rate_max: u32,

    /// Other calls a second of one caller at most
    #[arg(long, env = "HALLPASS_CALLER_LIST_RATE_MAX", default_value_t = DEFAULT_CALLER_LIST_RATE_MAX)]
    pub caller_list_rate_max: u32,

    /// Calls a second from one address at most, from one /64 with IPv6; loopback has no limit
    #[arg(long, env = "HALLPASS_ADDRESS_RATE_MAX", default_value_t = DEFAULT_ADDRESS_RATE_MAX)]
    pub address_rate_max: u32,

    /// Credentials a second from one address at most that are wrong or must be looked up
    #[arg(long, env = "HALLPASS_CREDENTIAL_RATE_MAX", default_value_t = DEFAULT_CREDENTIAL_RATE_MAX)]
    pub credential_rate_max: u32,

    /// Proxies whose x-forwarded-for is believed: addresses or networks such as 10.0.0.0/8
    #[arg(long, env = "HALLPASS_TRUSTED_PROXIES", value_delimiter = ',', value_parser = parse_network)]
    pub trusted_proxies: Vec<IpNet>,

    /// A call's deadline where the caller has none or a later one
    #[arg(long, env = "HALLPASS_REQUEST_DEADLINE_MAX", default_value = DEFAULT_REQUEST_DEADLINE_MAX, value_parser = parse_duration)]
    pub request_deadline_max: Duration,

    /// End a stream after this time; its client opens another
    #[arg(long, env = "HALLPASS_STREAM_AGE_MAX", default_value = DEFAULT_STREAM_AGE_MAX, value_parser = parse_duration)]
    pub stream_age_max: Duration,
}

impl From<&LimitSettings> for Bounds {
    fn from(settings: &LimitSettings) -> Self {
        let some = |limit: Duration| (!limit.is_zero()).then_some(limit);
        Self {
            requests_in_flight_max: settings.requests_in_flight_max,
            caller_in_flight_max: settings.caller_in_flight_max,
            address_rate_max: settings.address_rate_max,
            credential_rate_max: settings.credential_rate_max,
            caller_rate_max: settings.caller_rate_max,
            caller_list_rate_max: settings.caller_list_rate_max,
            trusted_proxies: settings.trusted_proxies.clone(),
            request_deadline_max: some(settings.request_deadline_max),
            stream_age_max: some(settings.stream_age_max),
        }
    }
}

fn parse_network(text: &str) -> Result<IpNet, String> {
    let network = text.parse::<IpNet>();
    network
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "not an address or a network such as 10.0.0.0/8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_networks_or_addresses() {
        for (text, expected) in [
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            ("10.0.0.1", Some("10.0.0.1/32")),
            ("2001:db8::/32", Some("2001:db8::/32")),
            ("::1", Some("::1/128")),
            ("10.0.0.0/33", None),
            ("example.org", None),
            ("", None),
        ] {
            let network = parse_network(text).ok().map(|network| network.to_string());
            assert_eq!(network.as_deref(), expected, "{text}");
        }
    }
}
