//! `hallpass keys`: makes, lists and revokes API keys. A key is shown when it is made and never again.

use std::{process::ExitCode, str::FromStr, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{answer, authenticator::read_pepper, database::Database};
use crate::{
    auth::{
        Scope,
        api_key::{ApiKey, PREFIX},
    },
    config::{DatabaseSettings, PepperSettings, parse_duration},
    store::{
        DedicatedConnection,
        api_keys::{ListedKey, NewKey, Revocation},
    },
};

/// A key that is to live longer does not expire.
const VALID_FOR_MAX: Duration = Duration::from_secs(3_650 * 24 * 60 * 60);

/// Characters of a name: what a key is for, not a description. The table checks the same.
const NAME_CHARS_MAX: usize = 100;

/// Organizations of a key. The table checks the same.
const ORGANIZATIONS_MAX: usize = 1_000;

/// How long the database may work on one command.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Make, list and revoke API keys
#[derive(Debug, Args)]
pub(super) struct Keys {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(Create),
    List(List),
    Revoke(Revoke),
}

/// Make an API key and print it, once, to standard output
#[derive(Debug, Args)]
struct Create {
    /// What the key is for
    #[arg(value_parser = parse_name)]
    name: String,

    /// What its holder may do: any of check, list, audit, admin, metrics, with commas between
    #[arg(long, required = true, value_delimiter = ',')]
    scopes: Vec<Scope>,

    /// The organizations that its holder may ask about: UUIDs with commas between, or all
    #[arg(long, value_name = "UUID,UUID,...|all")]
    organizations: Organizations,

    /// For how long it is valid, for example 90d; without this it does not expire
    #[arg(long, value_name = "DURATION", value_parser = parse_validity)]
    expires: Option<Duration>,

    #[command(flatten)]
    pepper: PepperSettings,

    #[command(flatten)]
    database: DatabaseSettings,
}

/// List the API keys, the newest first
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    database: DatabaseSettings,
}

/// Revoke an API key, for good
#[derive(Debug, Args)]
struct Revoke {
    /// The key's id, the part between `hp_` and the next `_`
    id: String,

    #[command(flatten)]
    database: DatabaseSettings,
}

#[derive(Clone, Debug)]
enum Organizations {
    All,
    Only(Vec<Uuid>),
}

impl FromStr for Organizations {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let ids: Vec<Uuid> = text
            .split(',')
            .map(|id| {
                let parsed = Uuid::try_parse(id);
                parsed.map_err(|_| format!("`{}` is no UUID, and not `all`", id.escape_debug()))
            })
            .collect::<Result<_, _>>()?;
        if ids.len() > ORGANIZATIONS_MAX {
            return Err(format!(
                "names {} organizations, more than {ORGANIZATIONS_MAX}",
                ids.len()
            ));
        }
        Ok(Self::Only(ids))
    }
}

fn parse_name(name: &str) -> Result<String, String> {
    let chars = name.chars().count();
    if chars == 0 || chars > NAME_CHARS_MAX || name.chars().any(char::is_control) {
        return Err(format!(
            "must be 1 to {NAME_CHARS_MAX} characters on one line"
        ));
    }
    Ok(name.to_owned())
}

fn parse_validity(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("a key must be valid for some time".to_owned()),
        long if long > VALID_FOR_MAX => Err("at most 3650d".to_owned()),
        validity => Ok(validity),
    }
}

impl Keys {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let settings = match &self.command {
            Command::Create(create) => &create.database,
            Command::List(list) => &list.database,
            Command::Revoke(revoke) => &revoke.database,
        };
        let database = Database::open_migrated(settings).await?;
        let done = async {
            let connection =
                DedicatedConnection::open(&database.url, Some(STATEMENT_TIMEOUT)).await?;
            match &self.command {
                Command::Create(create) => create.run(&connection).await,
                Command::List(_) => Ok(answer(&table(&connection.api_key_list().await?))?),
                Command::Revoke(revoke) => revoke.run(&connection).await,
            }
        };
        let done = done.await;
        database.close().await?;
        done.map(|()| ExitCode::SUCCESS)
    }
}

impl Create {
    async fn run(&self, connection: &DedicatedConnection) -> anyhow::Result<()> {
        let pepper = read_pepper(&self.pepper)?;
        let key = ApiKey::generate().context("the operating system gives no random bits")?;
        let scopes: Vec<&str> = (Scope::ALL.into_iter())
            .filter(|scope| self.scopes.contains(scope))
            .map(Scope::name)
            .collect();
        let organizations = match &self.organizations {
            Organizations::All => None,
            Organizations::Only(ids) => Some(ids.as_slice()),
        };
        let expires = connection
            .api_key_insert(&NewKey {
                id: key.id.as_str(),
                hash: &key.hash(&pepper),
                name: &self.name,
                scopes: &scopes,
                organizations,
                valid_for: self.expires,
            })
            .await?;
        answer(&format!("{}\n", key.reveal()))?;
        let expires = match &*expires {
            "" => "does not expire".to_owned(),
            at => format!("expires at {at} UTC"),
        };
        eprintln!(
            "The key {expires}. It is shown this once: put it where secrets are kept.\n\
             Callers send it as `authorization: Bearer ...`; the hallpass commands take it from HALLPASS_TOKEN.\n\
             To take it back: hallpass keys revoke {}",
            key.id.as_str()
        );
        Ok(())
    }
}

impl Revoke {
    async fn run(&self, connection: &DedicatedConnection) -> anyhow::Result<()> {
        // Who pastes the whole key means its id, and the secret is not repeated.
        let id = self.id.strip_prefix(PREFIX).unwrap_or(&self.id);
        let id = id.split('_').next().unwrap_or_default();
        match connection.api_key_revoke(id).await? {
            Revocation::Revoked => {
                println!("revoked {id}: refused everywhere within --staleness-bound from now");
            }
            Revocation::RevokedBefore => println!("{id} had been revoked before"),
            Revocation::NoSuchKey => {
                bail!(
                    "no API key has the id `{}`: see `hallpass keys list`",
                    id.escape_debug()
                )
            }
        }
        Ok(())
    }
}

const HEADINGS: [&str; 8] = [
    "ID",
    "NAME",
    "SCOPES",
    "ORGANIZATIONS",
    "CREATED (UTC)",
    "EXPIRES",
    "LAST USED",
    "STATE",
];

fn table(keys: &[ListedKey]) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(keys.iter().map(cells));
    let mut widths = [0; HEADINGS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; HEADINGS.len()]| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

fn cells(key: &ListedKey) -> [String; HEADINGS.len()] {
    let organizations = match key.organizations.as_deref() {
        None => "all".to_owned(),
        Some([only]) => only.to_string(),
        Some(several) => format!("{} of them", several.len()),
    };
    let or = |text: &str, absent: &str| if text.is_empty() { absent } else { text }.to_owned();
    [
        key.id.clone(),
        key.name.escape_debug().to_string(),
        key.scopes.join(","),
        organizations,
        key.created.clone(),
        or(&key.expires, "never"),
        or(&key.last_used, "never"),
        key.state.clone(),
    ]
}
