//! Stands in for database.rs until it is merged.

use std::sync::atomic::{AtomicU32, Ordering};

use hallpass::store::migrations;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, NoTls};

pub(crate) const CLUSTER: &str = "host=/tmp/pg user=hallpass";

pub(crate) struct Database {
    pub(crate) url: String,
}

pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    drop(tokio::spawn(connection));
    client
        .batch_execute("SET lock_timeout = '10s'")
        .await
        .unwrap();
    client
}

async fn make(name: &str, template: &str) -> String {
    let client = connect(&format!("{CLUSTER} dbname=postgres")).await;
    client
        .batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        .await
        .unwrap();
    client
        .batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {template}"))
        .await
        .unwrap();
    format!("{CLUSTER} dbname={name}")
}

fn next_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("lt_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Database {
    pub(crate) async fn empty() -> Self {
        Self {
            url: make(&next_name(), "template0").await,
        }
    }

    pub(crate) async fn create() -> Self {
        static TEMPLATE: OnceCell<()> = OnceCell::const_new();
        TEMPLATE
            .get_or_init(|| async {
                let url = make("lt_template", "template0").await;
                migrations::migrate(&url.parse().unwrap(), |_| ())
                    .await
                    .unwrap();
            })
            .await;
        Self {
            url: make(&next_name(), "lt_template").await,
        }
    }

    pub(crate) async fn client(&self) -> Client {
        connect(&self.url).await
    }
}
