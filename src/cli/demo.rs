//! `hallpass demo`: everything on a made-up district, with three commands to paste.

use std::{path::PathBuf, pin::pin, process::ExitCode};

use anyhow::{Context, Error};
use uuid::Uuid;

use super::{
    database::Database,
    interrupted, reload,
    serve::{Entrance, OtherLogins, serve},
    settings::Parsed,
};
use crate::{
    config::{
        DEFAULT_DATA_DIR, DEFAULT_GRPC_LISTEN, DatabaseSettings, ListenAddress, ServeSettings,
    },
    limits::Bounds,
    server::Listener,
    store::{
        DedicatedConnection,
        demo::{DemoMember, DemoOrganization, DemoOverride},
    },
};

const ORGANIZATIONS: usize = 50;
const MEMBERS_AN_ORGANIZATION: usize = 200;

/// The permission that the commands to paste are about; the first organization leaves it as the catalog has it.
pub(super) const SAMPLE_PERMISSION: &str = "can_approve_expenses";

/// Serve a made-up district: 50 schools, 10,000 members, each school with settings of its own
#[derive(Debug, clap::Args)]
pub(super) struct Demo {
    /// Where the private PostgreSQL lives: the demo fills no other database
    #[arg(long, env = "HALLPASS_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    data_dir: PathBuf,

    #[command(flatten)]
    settings: ServeSettings,
}

impl Demo {
    pub(super) fn limits(&self) -> Bounds {
        Bounds::from(&self.settings.limits)
    }

    /// As that of `serve`.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        self.settings.check().map_err(Error::msg)
    }

    pub(super) async fn run(self, parsed: Parsed) -> anyhow::Result<ExitCode> {
        reload::survive_hangups()?;
        let mut interrupted = pin!(interrupted()?);
        self.check()?;
        let entrance = Entrance::open(&self.settings).await?;
        let private = DatabaseSettings {
            database_url: None,
            data_dir: self.data_dir,
        };
        let prepared = async {
            let database = Database::open_migrated(&private).await?;
            let sample = load(&database).await?;
            anyhow::Ok((database, sample))
        };
        let (database, sample) = tokio::select! {
            prepared = prepared => prepared?,
            () = &mut interrupted => return Ok(ExitCode::SUCCESS),
        };
        // Port 0 was to be chosen by the system: the commands name the one that it chose.
        let address = match &entrance.listeners.grpc {
            Listener::Tcp(listener) => ListenAddress::Tcp(listener.local_addr()?),
            Listener::Unix(_) => self.settings.grpc_listen.clone(),
        };
        let endpoint = match &address {
            ListenAddress::Tcp(address) if entrance.tls.is_some() => format!("https://{address}"),
            ListenAddress::Tcp(address) => format!("http://{address}"),
            ListenAddress::Unix(path) => format!("unix:{}", path.display()),
        };
        let has_tls = entrance.tls.is_some();
        let web = web_address(entrance.listeners.http.as_ref(), has_tls)?;
        let ops = web_address(entrance.listeners.ops.as_ref(), has_tls)?;
        let guide = guide(
            &endpoint,
            web.as_deref(),
            ops.as_deref(),
            &database,
            &sample,
        );
        serve(
            database,
            OtherLogins::default(),
            (&self.settings, parsed),
            entrance,
            move || println!("{guide}"),
            interrupted,
        )
        .await
    }
}

/// What to open in a browser, if there is anything.
fn web_address(listener: Option<&Listener>, has_tls: bool) -> anyhow::Result<Option<String>> {
    let Some(Listener::Tcp(listener)) = listener else {
        return Ok(None);
    };
    let scheme = if has_tls { "https" } else { "http" };
    Ok(Some(format!("{scheme}://{}", listener.local_addr()?)))
}

/// Two members of the first organization.
struct Sample {
    organization: Uuid,
    name: String,
    board_member: Uuid,
    volunteer: Uuid,
}

/// Loads a district, unless it has been loaded, for the matrix to be refreshed; returns its first organization.
pub(super) async fn fill(
    connection: &mut DedicatedConnection,
    organizations: usize,
    members: usize,
) -> anyhow::Result<DemoOrganization> {
    let permissions = connection.permission_keys().await?;
    // The last one is there only when all are: they are loaded in order.
    let last = drawn_id(&organization_name(organizations - 1));
    if !connection.organization_exists(last).await? {
        for index in 0..organizations {
            let organization = organization(index, members, &permissions);
            connection.load_demo_organization(&organization).await?;
            if (index + 1) % 10 == 0 {
                println!(
                    "loaded {} of {organizations} organizations, {} members",
                    index + 1,
                    (index + 1) * members
                );
            }
        }
        println!(
            "filling the matrix of {} permissions a member",
            permissions.len()
        );
    }
    Ok(organization(0, members, &permissions))
}

async fn load(database: &Database) -> anyhow::Result<Sample> {
    let mut connection = DedicatedConnection::open(&database.url, None).await?;
    let first = fill(&mut connection, ORGANIZATIONS, MEMBERS_AN_ORGANIZATION).await?;
    let member = |role| {
        let found = first.members.iter().find(|member| member.role == role);
        found
            .map(|member| member.user_id)
            .with_context(|| format!("the district has no {role}"))
    };
    let sample = Sample {
        organization: first.id,
        name: first.name.clone(),
        board_member: member("board_member")?,
        volunteer: member("volunteer")?,
    };
    // Whoever ran the demo before has pasted the third command.
    connection
        .set_demo_role(sample.organization, sample.volunteer, "volunteer")
        .await?;
    connection.refresh_matrix().await?;
    Ok(sample)
}

fn guide(
    endpoint: &str,
    web: Option<&str>,
    ops: Option<&str>,
    database: &Database,
    sample: &Sample,
) -> String {
    let program = std::env::args()
        .next()
        .unwrap_or_else(|| "hallpass".to_owned());
    let psql = database
        .private
        .as_ref()
        .map(|private| format!("psql '{}'", private.url()))
        .unwrap_or_default();
    let Sample {
        organization,
        name,
        board_member,
        volunteer,
    } = sample;
    let at = if endpoint == format!("http://{DEFAULT_GRPC_LISTEN}") {
        String::new()
    } else {
        format!(" --endpoint {endpoint}")
    };
    let metrics = ops.map_or_else(String::new, |ops| format!("\nMetrics at {ops}/metrics"));
    let ask = format!("{program} check{at}");
    let (pages, over_http) = match web {
        None => (String::new(), String::new()),
        Some(web) => (
            format!("\nHTTP at {web}, described at {web}/docs/"),
            format!(
                "
5. Ask over HTTP:
curl -s {web}/v1/check --json '{{\"organization_id\": \"{organization}\", \"user_id\": \"{volunteer}\", \"permission\": \"{SAMPLE_PERMISSION}\"}}'
"
            ),
        ),
    };
    format!(
        "
hallpass serves a made-up district: {ORGANIZATIONS} schools, {members} members
gRPC at {endpoint}{pages}{metrics}

Paste into another terminal:

1. A board member of {name} may approve expenses:
{ask} {organization} {board_member} {SAMPLE_PERMISSION}

2. A volunteer may not (add --explain for the facts behind it):
{ask} {organization} {volunteer} {SAMPLE_PERMISSION}

3. Promote the volunteer as the application would, in SQL, and ask again:
{psql} -c \"UPDATE profiles SET role = 'board_member' WHERE org_id = '{organization}' AND user_id = '{volunteer}'\"
{ask} {organization} {volunteer} {SAMPLE_PERMISSION}

4. See who has changed the volunteer's role, and who does from now on:
{program} audit tail{at} --affected-user {volunteer} --from-earliest
{over_http}
Ctrl-C stops it; the data stays.",
        members = ORGANIZATIONS * MEMBERS_AN_ORGANIZATION
    )
}

/// The same district every time: all that varies is drawn from hashes of names.
fn organization(index: usize, members: usize, permissions: &[String]) -> DemoOrganization {
    let name = organization_name(index);
    let members: Vec<DemoMember> = (0..members)
        .map(|member| demo_member(&name, member))
        .collect();
    let overrides = permissions
        .iter()
        .filter(|permission| index > 0 || *permission != SAMPLE_PERMISSION)
        .filter_map(|permission| demo_override(&name, permission, &members))
        .collect();
    DemoOrganization {
        id: drawn_id(&name),
        name: format!(
            "{} {}",
            PLACES[index % PLACES.len()],
            KINDS[index / PLACES.len() % KINDS.len()]
        ),
        members,
        overrides,
    }
}

fn organization_name(index: usize) -> String {
    format!("organization {index}")
}

fn demo_member(organization: &str, index: usize) -> DemoMember {
    let name = format!("{organization} member {index}");
    // Every organization has an admin, and a board, whatever is drawn.
    let role = match (index, draw(&name, "role", 100)) {
        (0, _) | (_, 0) => "admin",
        (1..=5, _) | (_, 1..=4) => "board_member",
        (_, 5..=14) => "committee_lead",
        (_, 15..=39) => "volunteer",
        (_, 40..=47) => "teacher",
        _ => "parent_member",
    };
    DemoMember {
        user_id: drawn_id(&name),
        role,
        first_name: FIRST_NAMES[draw(&name, "first name", FIRST_NAMES.len())],
        last_name: LAST_NAMES[draw(&name, "last name", LAST_NAMES.len())],
    }
}

/// A fifth of the permissions has a setting of the organization's own: another minimum role, users by name, or off.
fn demo_override(
    organization: &str,
    permission: &str,
    members: &[DemoMember],
) -> Option<DemoOverride> {
    let name = format!("{organization} {permission}");
    let kind = draw(&name, "kind", 20);
    if kind >= 4 {
        return None;
    }
    let granted =
        (0..3).map(|index| members[draw(&name, &format!("user {index}"), members.len())].user_id);
    Some(DemoOverride {
        permission: permission.to_owned(),
        min_role: (kind < 2).then(|| {
            ["volunteer", "committee_lead", "board_member", "admin"][draw(&name, "role", 4)]
        }),
        specific_users: (kind == 2).then(|| granted.collect()),
        is_enabled: kind < 3,
    })
}

fn drawn_id(name: &str) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..16]);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

fn draw(name: &str, what: &str, below: usize) -> usize {
    let hash = blake3::hash(format!("{name} {what}").as_bytes());
    let mut low = [0; 4];
    low.copy_from_slice(&hash.as_bytes()[..4]);
    u32::from_le_bytes(low) as usize % below
}

const PLACES: [&str; 10] = [
    "Lincoln",
    "Riverside",
    "Oak Hill",
    "Franklin",
    "Maple Grove",
    "Lakeview",
    "Roosevelt",
    "Sunnyside",
    "Jefferson",
    "Cedar Creek",
];
const KINDS: [&str; 5] = [
    "Elementary",
    "Middle School",
    "High School",
    "Academy",
    "Preschool",
];
const FIRST_NAMES: [&str; 12] = [
    "Amara", "Ben", "Carmen", "Deshawn", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jamal",
    "Kavya", "Liam",
];
const LAST_NAMES: [&str; 12] = [
    "Alvarez", "Brooks", "Chen", "Diaz", "Evans", "Fischer", "Garcia", "Haddad", "Ito", "Johnson",
    "Kim", "Lopez",
];
