//! What the benches have in common that write as an application does: a PostgreSQL of their own, an application's tables in it,
//! and imports into two databases in turns.

use std::{error::Error, time::Instant};

use hallpass::embedded::{Options, PrivatePostgres};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

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

/// 100,000 members.
const MEMBERS: &str = "
INSERT INTO profiles (user_id, org_id, role, first_name, last_name)
SELECT md5('u' || i)::uuid, md5('o' || i % 200)::uuid, 'volunteer', 'Ann', 'Archer' FROM generate_series(1, 100000) i;
VACUUM ANALYZE";

/// 100,000 rows in one statement.
pub(crate) const IMPORT: &str = "
INSERT INTO profiles (user_id, org_id, role)
SELECT gen_random_uuid(), md5('o' || i % 200)::uuid, 'volunteer' FROM generate_series(1, 100000) i";

/// An actor, so that the index of actors has its part.
const ACTOR: &str = "SELECT set_config('app.current_user_id', md5('u1')::uuid::text, true)";

/// Removed again between two imports, which is not timed.
pub(crate) const REMOVE_IMPORTED: &str = "
DELETE FROM profiles WHERE first_name IS NULL;
VACUUM profiles";

const IMPORTS: usize = 5;

/// A PostgreSQL in a temporary directory. Both end with what is returned, the server first.
pub(crate) fn start_postgres() -> Result<(PrivatePostgres, TempDir)> {
    let directory = tempfile::Builder::new()
        .prefix("hallpass-bench-")
        .tempdir_in("/tmp")?;
    // Its own account runs PostgreSQL where root runs this.
    std::fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let postgres = PrivatePostgres::start(&Options {
        data_dir: directory.path().join("data"),
        shim: env!("CARGO_BIN_EXE_hallpass").into(),
        settings: Vec::new(),
    })?;
    Ok((postgres, directory))
}

/// A database with nothing in it.
pub(crate) async fn create(postgres: &PrivatePostgres, name: &str) -> Result<()> {
    let admin = connect(&postgres.url_for("postgres")).await?;
    admin
        .batch_execute(&format!("CREATE DATABASE \"{name}\""))
        .await?;
    Ok(())
}

/// A database with the application's tables, and no members yet.
pub(crate) async fn application(postgres: &PrivatePostgres, name: &str) -> Result<Client> {
    create(postgres, name).await?;
    let client = connect(&postgres.url_for(name)).await?;
    client.batch_execute(APPLICATION).await?;
    Ok(client)
}

/// Puts [`MEMBERS`] in.
pub(crate) async fn add_members(client: &Client) -> Result<()> {
    // VACUUM is not for a batch, which is one transaction.
    for statement in MEMBERS.split(";\n") {
        client.batch_execute(statement).await?;
    }
    Ok(())
}

pub(crate) async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// What an import took in each database, in seconds, ascending.
pub(crate) async fn imports(
    clients: [&Client; 2],
    import: &str,
    remove: &str,
) -> Result<[Vec<f64>; 2]> {
    let import = format!("BEGIN; {ACTOR}; {import}; COMMIT");
    let mut taken = [Vec::new(), Vec::new()];
    for _ in 0..IMPORTS {
        for (client, taken) in clients.iter().zip(&mut taken) {
            let started = Instant::now();
            client.batch_execute(&import).await?;
            taken.push(started.elapsed().as_secs_f64());
            for statement in remove.split(';') {
                client.batch_execute(statement).await?;
            }
        }
    }
    for taken in &mut taken {
        taken.sort_by(f64::total_cmp);
    }
    Ok(taken)
}
