//! The figures of docs/adoption.md: what adoption takes, and what its recording costs the application's own writes; and of
//! docs/audit.md: what of that the audit log's indexes cost.
//!
//! Databases in one PostgreSQL that differ in that alone, written to in turns: machines differ and are noisy, the ratios
//! hold.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use hallpass::{
    embedded::{Options, PrivatePostgres},
    store::migrations::{Progress, migrate},
};
use hdrhistogram::Histogram;
use tokio_postgres::{Client, NoTls};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// PTO Connect's tables, as far as permissions go, with 200 organizations.
const APPLICATION: &str = "
CREATE TABLE organizations (id uuid PRIMARY KEY, name text NOT NULL);
CREATE TABLE profiles (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), user_id uuid NOT NULL, org_id uuid REFERENCES organizations,
    role text, first_name text, last_name text, email text, updated_at timestamptz DEFAULT now());
CREATE INDEX idx_profiles_user_org ON profiles (user_id, org_id) INCLUDE (role, first_name, last_name);
CREATE INDEX idx_profiles_org_role ON profiles (org_id, role, user_id);
CREATE UNIQUE INDEX profiles_member ON profiles (org_id, user_id);
CREATE TABLE organization_permission_templates (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), module_name varchar(50) NOT NULL,
    permission_key varchar(100) NOT NULL UNIQUE, permission_name varchar(200) NOT NULL, permission_description text,
    default_min_role varchar(20) DEFAULT 'committee_lead');
CREATE TABLE organization_permissions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), org_id uuid NOT NULL REFERENCES organizations,
    permission_key varchar(100) NOT NULL, min_role_required varchar(20) NOT NULL, specific_users uuid[],
    is_enabled boolean DEFAULT true, updated_at timestamptz DEFAULT now(), UNIQUE (org_id, permission_key));
INSERT INTO organizations SELECT md5('o' || i)::uuid, 'School ' || i FROM generate_series(0, 199) i;
INSERT INTO organization_permission_templates (module_name, permission_key, permission_name, default_min_role)
SELECT 'module_' || i % 7, 'can_' || i, 'Can ' || i, (ARRAY['volunteer', 'committee_lead', 'board_member'])[1 + i % 3]
FROM generate_series(1, 30) i;
INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
SELECT o.id, 'can_' || i, 'admin' FROM organizations o, generate_series(1, 12) i";

const MEMBERS: &str = "
INSERT INTO profiles (user_id, org_id, role, first_name, last_name)
SELECT md5('u' || i)::uuid, md5('o' || i % 200)::uuid, 'volunteer', 'Ann', 'Archer' FROM generate_series(1, 100000) i;
VACUUM ANALYZE";

const UPDATE: &str = "UPDATE profiles SET role = $1 WHERE user_id = md5('u' || $2::integer)::uuid";

const IMPORT: &str = "
INSERT INTO profiles (user_id, org_id, role)
SELECT gen_random_uuid(), md5('o' || i % 200)::uuid, 'volunteer' FROM generate_series(1, 100000) i";

/// As many settings, of permissions that are in no catalog: each is recorded all the same.
const IMPORT_SETTINGS: &str = "
INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
SELECT md5('o' || i % 200)::uuid, 'imported_' || i, 'admin' FROM generate_series(1, 100000) i";

const REMOVE_SETTINGS: &str = "
DELETE FROM organization_permissions WHERE permission_key LIKE 'imported_%';
VACUUM organization_permissions";

/// An actor, so that the index of actors has its part.
const ACTOR: &str = "SELECT set_config('app.current_user_id', md5('u1')::uuid::text, true)";

/// Those of migration 0012.
const DROP_INDEXES: &str = "
DROP INDEX public.permission_audit_log_time, public.permission_audit_log_organization,
    public.permission_audit_log_affected_user, public.permission_audit_log_actor,
    public.permission_audit_log_permission";

/// Removed again between two imports, which is not timed.
const REMOVE_IMPORTED: &str = "
DELETE FROM profiles WHERE first_name IS NULL;
VACUUM profiles";

const UPDATES: usize = 2_000;
const IMPORTS: usize = 5;

#[tokio::main]
async fn main() -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix("hallpass-adoption-")
        .tempdir_in("/tmp")?;
    std::fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let postgres = PrivatePostgres::start(&Options {
        data_dir: directory.path().join("data"),
        shim: env!("CARGO_BIN_EXE_hallpass").into(),
        settings: Vec::new(),
    })?;
    let without = application(&postgres, "without").await?;
    let with = application(&postgres, "with").await?;
    for client in [&without, &with] {
        // VACUUM is not for a batch, which is one transaction.
        for statement in MEMBERS.split(";\n") {
            client.batch_execute(statement).await?;
        }
    }

    println!("adoption of 100,000 members, 30 permissions");
    let mut since = Instant::now();
    migrate(&postgres.url_for("with").parse()?, |progress| {
        if let Progress::Applied(name) = progress {
            println!("  {name:22}{:>8.0} ms", since.elapsed().as_secs_f64() * 1e3);
            since = Instant::now();
        }
    })
    .await?;

    println!("{:34}{:>10}{:>10}{:>8}", "", "without", "with", "ratio");
    let new = || Histogram::<u64>::new(3);
    let (mut bare, mut recorded) = (new()?, new()?);
    for n in 0..UPDATES {
        for (client, histogram) in [(&without, &mut bare), (&with, &mut recorded)] {
            let role = if n % 2 == 0 { "admin" } else { "volunteer" };
            let started = Instant::now();
            client
                .execute(UPDATE, &[&role, &i32::try_from(n / 2 + 1)?])
                .await?;
            histogram.record(u64::try_from(started.elapsed().as_micros())?)?;
        }
    }
    for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
        let of = |histogram: &Histogram<u64>| histogram.value_at_quantile(quantile) as f64 / 1e3;
        row(
            &format!("one-row update, {name}, ms"),
            of(&bare),
            of(&recorded),
        );
    }

    let (bare, recorded) = imports([&without, &with], IMPORT, REMOVE_IMPORTED).await?;
    row("100,000-row import, best of 5, s", bare, recorded);

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
        let (without, with) = imports([&unindexed, &indexed], import, remove).await?;
        row(name, without, with);
    }
    Ok(())
}

/// The shortest that an import took in each database, in seconds.
async fn imports(clients: [&Client; 2], import: &str, remove: &str) -> Result<(f64, f64)> {
    let import = format!("BEGIN; {ACTOR}; {import}; COMMIT");
    let mut least = [Duration::MAX; 2];
    for _ in 0..IMPORTS {
        for (client, least) in clients.iter().zip(&mut least) {
            let started = Instant::now();
            client.batch_execute(&import).await?;
            *least = (*least).min(started.elapsed());
            for statement in remove.split(';') {
                client.batch_execute(statement).await?;
            }
        }
    }
    let [first, second] = least.map(|least| least.as_secs_f64());
    Ok((first, second))
}

/// A database with the application's tables, and no members yet.
async fn application(postgres: &PrivatePostgres, name: &str) -> Result<Client> {
    let admin = connect(&postgres.url_for("postgres")).await?;
    admin
        .batch_execute(&format!("CREATE DATABASE \"{name}\""))
        .await?;
    let client = connect(&postgres.url_for(name)).await?;
    client.batch_execute(APPLICATION).await?;
    Ok(client)
}

/// The same, adopted.
async fn adopted(postgres: &PrivatePostgres, name: &str) -> Result<Client> {
    let client = application(postgres, name).await?;
    migrate(&postgres.url_for(name).parse()?, |_| {}).await?;
    Ok(client)
}

async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

fn row(name: &str, without: f64, with: f64) {
    println!(
        "{name:34}{without:>10.2}{with:>10.2}{:>8.2}",
        with / without
    );
}
