//! Cached answers that the tables do not bear out, and that nothing else would find.

use std::{
    num::NonZeroU32,
    sync::{Arc, atomic::Ordering},
};

use hallpass::{
    cache::Cache,
    feed::{Progress, follow},
    loader::{Join, Loader},
    model::{BootTime, OrganizationId, Position, Subject, UserId},
    selfcheck::sampler,
    server::Config,
    store::{Store, load::ReadFrom},
};

use crate::{
    database::{Database, eventually},
    names::id,
    server::{APPROVE, Server, config, fill, run_sql, set_role},
};

/// The triggers are where they were and call what they called: the inspection finds nothing.
pub(crate) const STOP_RECORDING: &str = "
CREATE TABLE public.recorders AS
SELECT oid, pg_get_functiondef(oid) AS definition FROM pg_proc
WHERE oid IN (SELECT tgfoid FROM pg_trigger WHERE tgrelid = 'public.profiles'::regclass AND NOT tgisinternal);
DO $$
DECLARE
    recorder regproc;
BEGIN
    FOR recorder IN SELECT oid FROM public.recorders LOOP
        EXECUTE format('CREATE OR REPLACE FUNCTION %s() RETURNS trigger LANGUAGE plpgsql AS '
                       '''BEGIN RETURN NULL; END''', recorder);
    END LOOP;
END $$";

pub(crate) const GO_ON_RECORDING: &str = "
DO $$
DECLARE
    definition text;
BEGIN
    FOR definition IN SELECT r.definition FROM public.recorders r LOOP
        EXECUTE definition;
    END LOOP;
END $$";

#[tokio::test]
async fn a_wrong_answer_is_found_and_not_given_again() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let server = Server::start(Config {
        self_check_every: NonZeroU32::MIN,
        ..config(&database.url)
    })
    .await;
    let before = server.check("lincoln", "bob", APPROVE).await;
    assert!(before.is_cached() && before.response.allowed, "{before}");
    run_sql(&client, STOP_RECORDING).await;
    set_role(&client, "lincoln", "bob", "volunteer").await;
    run_sql(&client, GO_ON_RECORDING).await;
    eventually("the wrong answer is found", async || {
        let answer = server.check("lincoln", "bob", APPROVE).await;
        !answer.response.allowed
    })
    .await;
    let after = server.check("lincoln", "bob", APPROVE).await;
    assert!(after.is_cached() && !after.response.allowed, "{after}");
    assert_eq!(after.evidence.position, before.evidence.position);
    server.stop().await;
}

/// What the three outcomes are, on a cache whose feed stands still.
#[tokio::test]
async fn comparisons_are_counted_and_a_later_change_is_no_divergence() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let url = database.url.parse().unwrap();
    let store = Arc::new(Store::new(&url).unwrap());
    let (cache, progress) = (Arc::new(Cache::new(100)), Arc::new(Progress::default()));
    let feed = follow(url, Arc::clone(&cache), Arc::clone(&progress));
    let feed = tokio::spawn(feed);
    eventually("there is a lease", async || progress.lease().is_some()).await;
    feed.abort();
    let (loader, loads) = Loader::new(
        Arc::clone(&store),
        Arc::clone(&cache),
        Arc::clone(&progress),
    );
    tokio::spawn(loads);
    let (sampler, self_check) = sampler(NonZeroU32::MIN);
    tokio::spawn(self_check.run(store, Arc::clone(&cache), Arc::clone(&progress)));
    let counts = || {
        let counts = &sampler.comparisons;
        [&counts.agreed, &counts.overtaken, &counts.diverged]
            .map(|count| count.load(Ordering::Relaxed))
    };
    let bob = Subject {
        organization: OrganizationId(id("lincoln")),
        user: UserId(id("bob")),
    };
    let since = Join::SentSince(BootTime::now());
    let load = loader.load(vec![bob], since).await.unwrap();
    let head = load.head;
    let doubt = async |position: Position, expected: [u64; 3]| {
        let entry = cache.get(&bob).unwrap();
        sampler.count(&bob, &entry, position);
        eventually("the answer is compared", async || counts() == expected).await;
    };
    doubt(head, [1, 0, 0]).await;
    set_role(&client, "lincoln", "bob", "volunteer").await;
    doubt(head, [1, 1, 0]).await;
    // Of a history that is gone nothing is said.
    doubt(
        Position {
            uid: head.uid ^ 1,
            ..head
        },
        [1, 2, 0],
    )
    .await;
    // An entry of elsewhere says nothing of this organization; and here the log has lost the change.
    set_role(&client, "franklin", "bob", "volunteer").await;
    let lose = format!(
        "DELETE FROM hallpass.log_org WHERE org_id = :lincoln AND seq > {}",
        head.seq
    );
    run_sql(&client, &lose).await;
    assert_eq!(progress.read_from(), ReadFrom::MatrixOrView);
    doubt(head, [1, 2, 1]).await;
    assert!(cache.get(&bob).is_none());
    assert_eq!(progress.read_from(), ReadFrom::View);
}
