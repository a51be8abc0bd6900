//! What a lease says of the time, what the feed makes invalid and counts, and a connection that falls silent.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use hallpass::{
    cache::Cache,
    feed::{Lease, Progress, follow},
    loader::{Join, Loader},
    model::{BootTime, Change, OrganizationId, Position, Subject, UserId},
    server::Config,
    store::{
        Store,
        log::{Cursor, LogReader},
    },
};

use crate::{
    bypass::fail_over,
    database::{Database, eventually},
    names::id,
    proxy::{Proxy, Way},
    server::{APPROVE, MEMBERS, ORGANIZATIONS, Server, config, fill, head, run_sql, set_role},
};

/// Every page of the log takes this long: it asks whether it reads a standby.
const PAGE: Duration = Duration::from_millis(300);
const MAKE_PAGES_SLOW: &str = "
CREATE FUNCTION public.pg_is_in_recovery() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(0.3);
    RETURN false;
END $$;
DO $$
BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$";

const LEASES: usize = 3;

#[tokio::test]
async fn a_lease_dates_from_before_its_page_was_asked_for() {
    let database = Database::create().await;
    let client = database.client().await;
    client.batch_execute(MAKE_PAGES_SLOW).await.unwrap();
    let progress = Arc::new(Progress::default());
    let url = database.url.parse().unwrap();
    let feed = follow(url, Arc::new(Cache::new(10)), Arc::clone(&progress));
    let feed = tokio::spawn(feed);
    let mut leases = BTreeSet::new();
    eventually("leases are renewed", async || {
        if let Some(lease) = progress.lease() {
            let age = BootTime::now().since(lease.sent_at);
            assert!(
                age >= PAGE,
                "a page takes {PAGE:?}, and the lease is of {age:?} ago"
            );
            leases.insert(lease.sent_at);
        }
        leases.len() == LEASES
    })
    .await;
    feed.abort();
}

/// A lease from after the log should have been inspected says nothing; one from before is as good as it was.
#[test]
fn a_lease_is_believed_up_to_when_an_inspection_is_due() {
    let (cache, progress) = (Cache::new(1), Progress::default());
    let epoch = cache.begin_epoch(Position::ZERO);
    let renew = |sent_at| {
        progress.renew(Lease {
            applied: Position::ZERO,
            sent_at,
            epoch,
        });
        progress.lease().is_some()
    };
    let due = BootTime::now();
    assert!(renew(due), "nobody inspects");
    progress.believe_from(0, due);
    assert!(renew(due));
    let later = due.after(Duration::from_nanos(1));
    assert!(!renew(later));
    assert!(!progress.log_is_believed());
    progress.believe_from(0, later);
    assert!(progress.lease().is_some());
}

/// A router has forgotten the connection: whatever is sent over it is swallowed, and nobody says so.
#[tokio::test]
async fn a_connection_that_falls_silent_is_replaced_before_the_database_gives_it_up() {
    const REPLACED_WITHIN: Duration = Duration::from_secs(4);
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let proxy = Proxy::to(&database.url, Way::Open);
    let server = Server::start(Config {
        feed_database: config(&proxy.url).database,
        staleness_bound: Duration::from_secs(60),
        ..config(&database.url)
    })
    .await;
    for role in ["volunteer", "board_member", "parent_member"] {
        proxy.deafen();
        let began = Instant::now();
        set_role(&client, "lincoln", "bob", role).await;
        let change = head(&client).await;
        eventually("the change is applied", async || {
            let answer = server.check("franklin", "ann", APPROVE).await;
            assert!(answer.is_cached(), "{answer}");
            answer.seq() >= change
        })
        .await;
        assert!(began.elapsed() < REPLACED_WITHIN, "{:?}", began.elapsed());
    }
    server.stop().await;
}

fn subject(organization: &str, user: &str) -> Subject {
    Subject {
        organization: OrganizationId(id(organization)),
        user: UserId(id(user)),
    }
}

/// What changes, by how much each counter goes up, and who is left.
type Case<'a> = (&'a str, [u64; 7], &'a dyn Fn(&Subject) -> bool);

#[tokio::test]
async fn invalidations_are_counted_by_cause_and_cost_what_they_must() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let url: hallpass::store::DatabaseUrl = database.url.parse().unwrap();
    let (cache, progress) = (Arc::new(Cache::new(100)), Arc::new(Progress::default()));
    let feed = follow(url.clone(), Arc::clone(&cache), Arc::clone(&progress));
    let feed = tokio::spawn(feed);
    eventually("there is a lease", async || progress.lease().is_some()).await;
    let store = Arc::new(Store::new(&url).unwrap());
    let (loader, loads) = Loader::new(store, Arc::clone(&cache), Arc::clone(&progress));
    tokio::spawn(loads);
    let subjects: Vec<Subject> = (ORGANIZATIONS.iter())
        .flat_map(|organization| MEMBERS.map(|(user, _)| subject(organization, user)))
        .collect();
    let counts = || {
        let causes = &cache.invalidations;
        [
            &causes.memberships,
            &causes.membership_entries,
            &causes.named_users,
            &causes.named_user_entries,
            &causes.overrides,
            &causes.everything,
            &causes.epochs,
        ]
        .map(|count| count.load(Ordering::Relaxed))
    };
    let kept = head(&client).await;
    let lincoln = id("lincoln");
    #[rustfmt::skip]
    let cases: [Case<'_>; 6] = [
        ("UPDATE public.profiles SET role = 'admin' WHERE org_id = :lincoln AND user_id = :bob",
         [1, 1, 0, 0, 0, 0, 0], &|known| *known != subject("lincoln", "bob")),
        // He had no entry.
        ("INSERT INTO public.profiles (org_id, user_id, role) VALUES (:lincoln, :eve, 'admin')",
         [1, 0, 0, 0, 0, 0, 0], &|_| true),
        ("INSERT INTO public.organization_permissions (org_id, permission_key, specific_users)
          VALUES (:lincoln, 'can_approve_expenses', ARRAY[:vic])",
         [0, 0, 1, 1, 0, 0, 0], &|known| *known != subject("lincoln", "vic")),
        ("UPDATE public.organization_permissions SET is_enabled = false",
         [0, 0, 0, 0, 1, 0, 0], &|known| known.organization.0 != lincoln),
        ("UPDATE public.permission_roles SET rank = 5 WHERE role_key = 'admin'",
         [0, 0, 0, 0, 0, 1, 0], &|_| false),
        ("a failover", [0, 0, 0, 0, 0, 0, 1], &|_| false),
    ];
    for (sql, expected, is_left) in cases {
        let since = Join::SentSince(BootTime::now());
        loader.load(subjects.clone(), since).await.unwrap();
        assert!(subjects.iter().all(|known| cache.get(known).is_some()));
        let before = counts();
        if sql == "a failover" {
            fail_over(&client, kept, "SELECT", "SELECT").await;
        } else {
            run_sql(&client, sql).await;
        }
        let difference = || {
            let after = counts();
            [0, 1, 2, 3, 4, 5, 6].map(|cause| after[cause] - before[cause])
        };
        eventually(sql, async || difference() == expected).await;
        for known in &subjects {
            assert_eq!(
                cache.get(known).is_some(),
                is_left(known),
                "{sql}: {known:?}"
            );
        }
    }
    feed.abort();
}

/// Nobody's memory holds an entry: it comes in pages, and is applied with the last of them.
#[tokio::test]
async fn an_entry_of_100_000_rows_comes_in_pages() {
    const ROWS: usize = 100_000;
    const PAGE_ROWS: i64 = 1_000;
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let url = database.url.parse().unwrap();
    let log = LogReader::open(&url).await.unwrap();
    let before = log.head().await.unwrap();
    let insert = format!(
        "INSERT INTO public.profiles (org_id, user_id, role)
         SELECT :lincoln, md5('parent ' || i)::uuid, 'volunteer' FROM generate_series(1, {ROWS}) i"
    );
    run_sql(&client, &insert).await;
    let after = log.head().await.unwrap();
    let mut cursor = Cursor::after(before);
    let mut users = BTreeSet::new();
    loop {
        let page = log.page(cursor, &[before], PAGE_ROWS).await.unwrap();
        assert!(page.changes.len() <= usize::try_from(PAGE_ROWS).unwrap());
        for (seq, change) in page.changes {
            assert_eq!(seq, after.seq);
            let Change::Membership(subject) = change else {
                panic!("{change:?}");
            };
            assert!(users.insert(subject.user), "{subject:?} twice");
        }
        cursor = page.next;
        if !page.full {
            break;
        }
        assert_eq!(cursor.applied, before);
    }
    assert_eq!((cursor.applied, users.len()), (after, ROWS));
}
