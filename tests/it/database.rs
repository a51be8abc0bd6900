//! A database a test, cloned from a migrated template in the process's cluster; and reading its tables as plain data.
//!
//! The cluster has the roles of `deploy/sql/roles.sql`, and the template was migrated as an operator does it. Tests log
//! in as a superuser and stand for the application; the services that they start log in as `hallpass_service`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use hallpass::store::migrations::migrate;
use tokio::{sync::OnceCell, time::sleep, try_join};
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::{
    names::{NO_ORGANIZATION, Names, id},
    oracle::{Override, Template, World},
    roles::make_roles,
    support,
};

const TEMPLATE: &str = "migrated";

/// The login of the test cluster.
const SUPERUSER: &str = "hallpass";

/// What nothing here should take; a test that gets there has failed.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(2);

const IS_LEFT_ALONE: &str = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = $1)";

const CATALOG: &str = "
SELECT permission_key, module_name, default_min_role FROM public.organization_permission_templates";

/// An array of any dimensions is read as a plain list.
const OVERRIDES: &str = "
SELECT org_id, permission_key, min_role_required, is_enabled,
       CASE WHEN specific_users IS NOT NULL THEN ARRAY(SELECT unnest(specific_users)) END
FROM public.organization_permissions";

const EMPTY: &str = "
TRUNCATE public.organizations, public.profiles, public.organization_permissions,
         public.organization_permission_templates, public.permission_roles CASCADE";

const INSERT_TEMPLATE: &str = "
INSERT INTO public.organization_permission_templates (module_name, permission_key, permission_name, default_min_role)
VALUES ($1, $2::text, initcap($2::text), $3)";

const INSERT_OVERRIDE: &str = "
INSERT INTO public.organization_permissions (org_id, permission_key, min_role_required, is_enabled, specific_users)
VALUES ($1, $2, $3, $4, $5)";

/// The two shapes that `profiles` has had at PTO Connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// A profile has a `user_id`. What `migrate` makes of nothing has this shape.
    A,
    /// A profile's `id` is the user, who has one profile at most.
    B,
}

impl Shape {
    /// The column of `profiles` that is the user.
    pub(crate) fn user_column(self) -> &'static str {
        match self {
            Self::A => "user_id",
            Self::B => "id",
        }
    }
}

/// A test's own database, with the whole schema in it and the seeded catalog and ladder.
pub(crate) struct Database {
    pub(crate) url: String,
    pub(crate) shape: Shape,
}

impl Database {
    /// Takes about 50 ms: PostgreSQL copies the template's files.
    pub(crate) async fn create() -> Self {
        Self::copy(TEMPLATE, SUPERUSER, Shape::A).await
    }

    /// One with nothing in it.
    pub(crate) async fn empty() -> Self {
        Self::copy("template0", SUPERUSER, Shape::A).await
    }

    /// One that `owner` has, with what is in `template`.
    pub(crate) async fn copy(template: &str, owner: &str, shape: Shape) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // For an empty one too: roles are the cluster's, and a test must not find them or not by chance.
        prepare().await;
        let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        create_database(&name, template, owner).await;
        Self {
            url: support::cluster().url_for(&name),
            shape,
        }
    }

    /// A connection of its own, closed when it is dropped. Waits for no lock longer than ten seconds.
    pub(crate) async fn client(&self) -> Client {
        connect(&self.url).await
    }
}

/// The cluster's roles, and the template with the whole schema.
async fn prepare() {
    static PREPARED: OnceCell<()> = OnceCell::const_new();
    PREPARED
        .get_or_init(async || {
            make_template(TEMPLATE, "template1", SUPERUSER, async |url| {
                make_roles(&url, None).await.unwrap();
                let migrator = as_role(&url, "hallpass_migrator");
                migrate(&migrator.parse().unwrap(), |_| {}).await.unwrap();
            })
            .await;
        })
        .await;
}

/// Makes a database to copy from, out of another, when it is first asked for. `fill` is given its URL.
pub(crate) async fn template(name: &str, from: &str, owner: &str, fill: impl AsyncFnOnce(String)) {
    static MADE: Mutex<BTreeMap<String, Arc<OnceCell<()>>>> = Mutex::new(BTreeMap::new());
    prepare().await;
    let made = Arc::clone(MADE.lock().unwrap().entry(name.to_owned()).or_default());
    made.get_or_init(async || make_template(name, from, owner, fill).await)
        .await;
}

async fn make_template(name: &str, from: &str, owner: &str, fill: impl AsyncFnOnce(String)) {
    create_database(name, from, owner).await;
    fill(support::cluster().url_for(name)).await;
    // Nobody may be connected to a database while it is copied, and who has filled it may be leaving just now.
    let admin = connect(&support::cluster().url_for("postgres")).await;
    eventually("nobody is connected to the template", async || {
        let row = admin.query_one(IS_LEFT_ALONE, &[&name]).await;
        row.unwrap().get(0)
    })
    .await;
}

async fn create_database(name: &str, template: &str, owner: &str) {
    let admin = connect(&support::cluster().url_for("postgres")).await;
    let create = format!("CREATE DATABASE {name} TEMPLATE {template} OWNER {owner}");
    admin.batch_execute(&create).await.unwrap();
}

/// The superuser's URL of a database, for another login.
pub(crate) fn as_role(url: &str, role: &str) -> String {
    url.replace("user=hallpass", &format!("user={role}"))
}

/// As [`Database::client`], wherever and as whoever the URL says.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    // Ends with the client; its errors reach the client's queries.
    drop(tokio::spawn(connection));
    client
        .batch_execute("SET lock_timeout = '10s'")
        .await
        .unwrap();
    client
}

/// Asks until it holds, within [`PATIENCE`].
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(POLL_INTERVAL).await;
    }
}

/// What decisions are made of, as the tables have it now (for `client`: its open transaction's changes too).
pub(crate) async fn read_world(client: &Client, shape: Shape, names: &Names) -> World {
    let user = shape.user_column();
    let members = format!("SELECT org_id, {user}, role FROM public.profiles");
    let (ladder, catalog, members, overrides) = try_join!(
        client.query("SELECT role_key, rank FROM public.permission_roles", &[]),
        client.query(CATALOG, &[]),
        client.query(&members, &[]),
        client.query(OVERRIDES, &[]),
    )
    .unwrap();
    World {
        ladder: ladder.iter().map(|row| (row.get(0), row.get(1))).collect(),
        catalog: catalog
            .iter()
            .map(|row| {
                let template = Template {
                    module: row.get(1),
                    min_role: row.get(2),
                };
                (row.get(0), template)
            })
            .collect(),
        // A profile without an organization is no membership.
        members: members
            .iter()
            .filter_map(|row| Some((row.get::<_, Option<Uuid>>(0)?, row)))
            .map(|(org, row)| ((names.of(org), names.of(row.get(1))), row.get(2)))
            .collect(),
        overrides: overrides
            .iter()
            .map(|row| {
                let users: Option<Vec<Option<Uuid>>> = row.get(4);
                let setting = Override {
                    min_role: row.get(2),
                    enabled: row.get(3),
                    users: users.map(|ids| ids.into_iter().map(|id| Some(names.of(id?))).collect()),
                };
                ((names.of(row.get(0)), row.get(1)), setting)
            })
            .collect(),
    }
}

/// Makes the tables hold `world` and nothing else.
pub(crate) async fn write_world(client: &mut Client, shape: Shape, world: &World, names: &Names) {
    let transaction = client.transaction().await.unwrap();
    transaction.batch_execute(EMPTY).await.unwrap();
    for organization in names.organizations.iter().filter(|o| *o != NO_ORGANIZATION) {
        let insert = "INSERT INTO public.organizations (id, name) VALUES ($1, $2)";
        transaction
            .execute(insert, &[&id(organization), organization])
            .await
            .unwrap();
    }
    for (role, rank) in &world.ladder {
        let insert = "INSERT INTO public.permission_roles (role_key, rank) VALUES ($1, $2)";
        transaction.execute(insert, &[role, rank]).await.unwrap();
    }
    for (permission, template) in &world.catalog {
        transaction
            .execute(
                INSERT_TEMPLATE,
                &[&template.module, permission, &template.min_role],
            )
            .await
            .unwrap();
    }
    let user = shape.user_column();
    let insert = format!("INSERT INTO public.profiles (org_id, {user}, role) VALUES ($1, $2, $3)");
    for ((organization, user), role) in &world.members {
        transaction
            .execute(&insert, &[&id(organization), &id(user), role])
            .await
            .unwrap();
    }
    for ((organization, permission), setting) in &world.overrides {
        let users: Option<Vec<Option<Uuid>>> = setting
            .users
            .as_ref()
            .map(|users| users.iter().map(|user| user.as_deref().map(id)).collect());
        transaction
            .execute(
                INSERT_OVERRIDE,
                &[
                    &id(organization),
                    permission,
                    &setting.min_role,
                    &setting.enabled,
                    &users,
                ],
            )
            .await
            .unwrap();
    }
    transaction.commit().await.unwrap();
}
