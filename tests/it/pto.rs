//! PTO Connect's database as hallpass finds it, made from `tests/adoption`, and after its adoption.
//!
//! Its owner is no superuser, as on Supabase: what adoption needs beyond owning the tables would fail here.

use std::collections::BTreeSet;

use hallpass::store::migrations::migrate;
use tokio::sync::OnceCell;
use tokio_postgres::Client;

use crate::{
    database::{Database, Shape, as_role, connect, template},
    names::{Names, id},
    sql::run,
    support,
};

pub(crate) const OWNER: &str = "pto_owner";

/// The name that PTO Connect's audit log has in an adopted database.
pub(crate) const OLD_AUDIT_LOG: &str = "permission_audit_log_before_hallpass";

const ROLES: &str = include_str!("../adoption/roles.sql");
const SUPABASE: &str = include_str!("../adoption/supabase.sql");
const TABLES: &str = include_str!("../adoption/tables.sql");
const SHAPE_A: &str = include_str!("../adoption/shape_a.sql");
const SHAPE_B: &str = include_str!("../adoption/shape_b.sql");
const POLICIES: &str = include_str!("../adoption/policies.sql");
const RELAXED: &str = include_str!("../adoption/relaxed.sql");
const PHASE_2: &str = include_str!("../adoption/phase2.sql");
const PHASE_2_A: &str = include_str!("../adoption/phase2_a.sql");
const PHASE_2_B: &str = include_str!("../adoption/phase2_b.sql");
const ROWS: &str = include_str!("../adoption/rows.sql");
const ROWS_A: &str = include_str!("../adoption/rows_a.sql");
const PHASE_2_ROWS: &str = include_str!("../adoption/phase2_rows.sql");

/// A scenario empties `profiles` with TRUNCATE, which no foreign key may lead to.
const RELAX_PHASE_2: &str = "ALTER TABLE permission_audit_log DROP CONSTRAINT permission_audit_log_changed_by_profile_id_fkey";

/// Whom the rows speak of.
pub(crate) const ORGANIZATIONS: [&str; 3] = ["lincoln", "franklin", "madison"];
pub(crate) const USERS: [&str; 9] = [
    "ann", "bob", "cam", "vic", "pat", "tia", "dan", "eve", "lou",
];

/// How far PTO Connect has taken its permissions: `Two` has indexes, an audit log, views and functions for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    One,
    Two,
}

/// One of the databases that there may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pto {
    pub(crate) shape: Shape,
    pub(crate) phase: Phase,
}

impl Pto {
    pub(crate) const ALL: [Self; 4] = [
        Self::new(Shape::A, Phase::One),
        Self::new(Shape::A, Phase::Two),
        Self::new(Shape::B, Phase::One),
        Self::new(Shape::B, Phase::Two),
    ];

    pub(crate) const fn new(shape: Shape, phase: Phase) -> Self {
        Self { shape, phase }
    }

    /// As hallpass finds it, with rows.
    pub(crate) async fn found(self) -> Database {
        let name = self.found_template().await;
        Database::copy(&name, OWNER, self.shape).await
    }

    /// As hallpass leaves it.
    pub(crate) async fn adopted(self) -> Database {
        let found = self.found_template().await;
        let name = format!("{found}_adopted");
        template(&name, &found, OWNER, async |url| adopt(&url).await).await;
        Database::copy(&name, OWNER, self.shape).await
    }

    async fn found_template(self) -> String {
        let Self { shape, phase } = self;
        let name = format!("pto_{shape:?}_{phase:?}").to_lowercase();
        make_roles().await;
        template(&name, "template1", OWNER, async |url| {
            let owner = begin(&url, shape).await;
            if phase == Phase::Two {
                add_phase_2(&owner, shape).await;
            }
            run(&owner, &resolve(shape, ROWS)).await;
            if shape == Shape::A {
                run(&owner, ROWS_A).await;
            }
            if phase == Phase::Two {
                run(&owner, &resolve(shape, PHASE_2_ROWS)).await;
            }
        })
        .await;
        name
    }
}

/// An adopted database that takes the data of any scenario; it has none yet.
pub(crate) async fn for_scenarios(shape: Shape) -> Database {
    let name = format!("pto_{shape:?}_relaxed").to_lowercase();
    make_roles().await;
    template(&name, "template1", OWNER, async |url| {
        let owner = begin(&url, shape).await;
        run(&owner, RELAXED).await;
        add_phase_2(&owner, shape).await;
        run(&owner, RELAX_PHASE_2).await;
        drop(owner);
        adopt(&url).await;
    })
    .await;
    Database::copy(&name, OWNER, shape).await
}

/// The URL for the owner, who is no superuser.
pub(crate) fn as_owner(url: &str) -> String {
    as_role(url, OWNER)
}

/// As the owner. The service logs in as `hallpass_service`, as in every test.
pub(crate) async fn adopt(url: &str) {
    migrate(&as_owner(url).parse().unwrap(), |_| {})
        .await
        .unwrap();
}

/// Replaces each `:name` of an organization or a user by its id, and `:user` by the user's column of `profiles`.
pub(crate) fn resolve(shape: Shape, sql: &str) -> String {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let names = Names::new(set(&ORGANIZATIONS), set(&USERS), BTreeSet::new()).unwrap();
    let sql = sql.replace(":user", shape.user_column());
    names.resolve(&sql).unwrap()
}

/// Makes the session one that the API gives to a user.
pub(crate) async fn log_in(client: &Client, user: &str) {
    let claims = format!(
        "RESET ROLE; SELECT set_config('request.jwt.claims', '{{\"sub\": \"{}\"}}', false); SET ROLE authenticated",
        id(user)
    );
    run(client, &claims).await;
}

/// Roles are the cluster's: made once, for two at once would meet.
async fn make_roles() {
    static MADE: OnceCell<()> = OnceCell::const_new();
    MADE.get_or_init(async || {
        let superuser = connect(&support::cluster().url_for("postgres")).await;
        run(&superuser, ROLES).await;
    })
    .await;
}

/// Everything up to Phase 1, and the owner's connection to it.
async fn begin(url: &str, shape: Shape) -> Client {
    run(&connect(url).await, SUPABASE).await;
    let owner = connect(&as_owner(url)).await;
    run(&owner, TABLES).await;
    let profiles = match shape {
        Shape::A => SHAPE_A,
        Shape::B => SHAPE_B,
    };
    run(&owner, profiles).await;
    run(&owner, &POLICIES.replace(":user", shape.user_column())).await;
    owner
}

async fn add_phase_2(owner: &Client, shape: Shape) {
    let (names, rest) = match shape {
        Shape::A => (", first_name, last_name", PHASE_2_A),
        Shape::B => ("", PHASE_2_B),
    };
    let common = PHASE_2.replace(":user", shape.user_column());
    run(owner, &common.replace(":names", names)).await;
    run(owner, rest).await;
}
