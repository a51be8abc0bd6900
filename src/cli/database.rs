//! The database of a command: the one that was named, or a private one started for it and stopped with it.

use std::path::Path;

use anyhow::{Context, anyhow};
use tokio::task::spawn_blocking;

use crate::{
    config::DatabaseSettings,
    embedded::{Options, PrivatePostgres},
    store::{DatabaseUrl, migrations},
};

/// Where to find the database, and the private server if it is ours to keep running.
pub(super) struct Database {
    pub(super) url: DatabaseUrl,
    pub(super) private: Option<PrivatePostgres>,
}

impl Database {
    pub(super) async fn open(settings: &DatabaseSettings) -> anyhow::Result<Self> {
        if let Some(url) = &settings.database_url {
            let url = url
                .0
                .parse()
                .map_err(|error| anyhow!("--database-url: {error}"))?;
            return Ok(Self { url, private: None });
        }
        let private = start_private(&settings.data_dir).await?;
        Ok(Self {
            url: private
                .url()
                .parse()
                .map_err(|error| anyhow!("{}: {error}", private.url()))?,
            private: Some(private),
        })
    }

    /// As [`Database::open`], with the schema of this program where the database is ours.
    pub(super) async fn open_migrated(settings: &DatabaseSettings) -> anyhow::Result<Self> {
        let database = Self::open(settings).await?;
        if database.private.is_some() {
            migrations::migrate(&database.url, |progress| {
                tracing::info!(?progress, "migrating")
            })
            .await?;
        }
        Ok(database)
    }

    /// Completes, with the reason, when the private server ends by itself; never for a database that was named.
    pub(super) async fn lost(&self) -> anyhow::Error {
        match &self.private {
            Some(private) => private.exited().await,
            None => std::future::pending().await,
        }
        anyhow!("postgres ended by itself: postgres.log in the data directory says why")
    }

    pub(super) async fn close(self) -> anyhow::Result<()> {
        if let Some(private) = self.private {
            spawn_blocking(move || private.stop()).await??;
        }
        Ok(())
    }
}

pub(super) async fn start_private(data_dir: &Path) -> anyhow::Result<PrivatePostgres> {
    let options = Options {
        data_dir: data_dir.to_owned(),
        shim: std::env::current_exe().context("cannot find the hallpass program")?,
        settings: Vec::new(),
    };
    Ok(spawn_blocking(move || PrivatePostgres::start(&options)).await??)
}
