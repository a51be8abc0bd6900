//! The settings of connections, their defaults and why. 0 switches a limit off.

use std::{num::NonZeroUsize, time::Duration};

use clap::Args;

use super::parse_duration;

/// Ten from each of a thousand replicas of what calls; idle with TLS, they take a few hundred megabytes.
const DEFAULT_CONNECTIONS_MAX: &str = "10000";

/// A hundred replicas behind one address, ten connections each; a single stranger leaves nine tenths to the others.
const DEFAULT_ADDRESS_CONNECTIONS_MAX: usize = 1_000;

/// Callers spread over new replicas within this time, and whoever shows a certificate shows it again. Not shorter,
/// because some clients do not repeat by themselves what they were about to send just then.
const DEFAULT_CONNECTION_AGE_MAX: &str = "1h";

/// How many connections there may be, and how old each.
#[derive(Args, Clone, Debug)]
pub struct ConnectionSettings {
    /// Connections at once at most; further ones are closed
    #[arg(long, env = "HALLPASS_CONNECTIONS_MAX", default_value = DEFAULT_CONNECTIONS_MAX)]
    pub connections_max: NonZeroUsize,

    /// Connections at once at most from one address, from one /64 with IPv6
    #[arg(long, env = "HALLPASS_ADDRESS_CONNECTIONS_MAX", default_value_t = DEFAULT_ADDRESS_CONNECTIONS_MAX)]
    pub address_connections_max: usize,

    /// Take no more calls on a connection after this time; its client opens another
    #[arg(long, env = "HALLPASS_CONNECTION_AGE_MAX", default_value = DEFAULT_CONNECTION_AGE_MAX, value_parser = parse_duration)]
    pub connection_age_max: Duration,
}
