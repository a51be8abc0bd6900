//! What a lease says of the time: it is as old as the question that it answers, not as its answer.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use hallpass::{
    cache::Cache,
    feed::{Progress, follow},
    model::BootTime,
};

use crate::database::{Database, eventually};

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
