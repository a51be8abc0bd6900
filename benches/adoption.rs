//! The figures of docs/adoption.md: what adoption takes; and of docs/audit.md: what the audit log's indexes cost those who
//! write.
//!
//! Databases in one PostgreSQL that differ in that alone, written to in turns: machines differ and are noisy, the ratios
//! hold.

mod application;

use std::time::Instant;

use hallpass::{
    embedded::PrivatePostgres,
    store::migrations::{Progress, migrate},
};
use tokio_postgres::Client;

use self::application::{
    IMPORT, REMOVE_IMPORTED, Result, add_members, application, imports, start_postgres,
};

/// As many settings, of permissions that are in no catalog: each is recorded all the same.
const IMPORT_SETTINGS: &str = "
INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
SELECT md5('o' || i % 200)::uuid, 'imported_' || i, 'admin' FROM generate_series(1, 100000) i";

const REMOVE_SETTINGS: &str = "
DELETE FROM organization_permissions WHERE permission_key LIKE 'imported_%';
VACUUM organization_permissions";

/// Those of migration 0012.
const DROP_INDEXES: &str = "
DROP INDEX public.permission_audit_log_time, public.permission_audit_log_organization,
    public.permission_audit_log_affected_user, public.permission_audit_log_actor,
    public.permission_audit_log_permission";

#[tokio::main]
async fn main() -> Result<()> {
    let (postgres, _directory) = start_postgres()?;
    add_members(&application(&postgres, "adopted").await?).await?;

    println!("adoption of 100,000 members, 30 permissions");
    let mut since = Instant::now();
    migrate(&postgres.url_for("adopted").parse()?, |progress| {
        if let Progress::Applied(name) = progress {
            println!("  {name:22}{:>8.0} ms", since.elapsed().as_secs_f64() * 1e3);
            since = Instant::now();
        }
    })
    .await?;

    println!("the audit log's five indexes");
    let indexed = adopted(&postgres, "indexed").await?;
    let unindexed = adopted(&postgres, "unindexed").await?;
    unindexed.batch_execute(DROP_INDEXES).await?;
    println!("{:34}{:>10}{:>10}{:>8}", "", "without", "with", "ratio");
    for (name, import, remove) in [
        ("100,000 members, best of 5, s", IMPORT, REMOVE_IMPORTED),
        (
            "100,000 settings, best of 5, s",
            IMPORT_SETTINGS,
            REMOVE_SETTINGS,
        ),
    ] {
        let [without, with] = imports([&unindexed, &indexed], import, remove).await?;
        row(name, without[0], with[0]);
    }
    Ok(())
}

/// A database with the application's tables, adopted.
async fn adopted(postgres: &PrivatePostgres, name: &str) -> Result<Client> {
    let client = application(postgres, name).await?;
    migrate(&postgres.url_for(name).parse()?, |_| {}).await?;
    Ok(client)
}

fn row(name: &str, without: f64, with: f64) {
    println!(
        "{name:34}{without:>10.2}{with:>10.2}{:>8.2}",
        with / without
    );
}
