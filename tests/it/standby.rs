//! A standby lags without a bound and answers like any other server: what it says is not taken.

use std::fs;

use hallpass::{
    embedded::PrivatePostgres,
    model::{OrganizationId, Position, Subject, UserId},
    store::{
        DatabaseUrl, Store, StoreError,
        load::ReadFrom,
        log::{Cursor, LogReader},
        migrations::migrate,
    },
};
use tokio::runtime::Runtime;

use crate::{database::Database, names::id, support};

fn somebody() -> Subject {
    Subject {
        organization: OrganizationId(id("lincoln")),
        user: UserId(id("bob")),
    }
}

#[test]
fn a_standby_is_not_asked() {
    let runtime = Runtime::new().unwrap();
    let directory = support::temporary_directory();
    let options = support::options(directory.path());
    let primary = PrivatePostgres::start(&options).unwrap();
    let url: DatabaseUrl = primary.url().parse().unwrap();
    runtime.block_on(migrate(&url, |_| {})).unwrap();
    primary.stop().unwrap();
    // Of no primary: it has all that there was, and waits for more.
    fs::write(directory.path().join("postgres/standby.signal"), "").unwrap();
    let standby = PrivatePostgres::start(&options).unwrap();
    runtime.block_on(async {
        let store = Store::new(&url).unwrap();
        assert!(
            store
                .load(&[somebody()], ReadFrom::View, Position::default)
                .await
                .is_err()
        );
        assert!(LogReader::open(&url).await.is_err());
    });
    standby.stop().unwrap();
}

/// A pooler can put a standby behind a connection that began at a primary: here functions say so.
const BECOME_A_STANDBY: &str = "
DO $$
DECLARE
    definition text;
BEGIN
    FOR definition IN
        SELECT pg_get_functiondef(oid) FROM pg_proc
        WHERE pronamespace = 'hallpass'::regnamespace AND prosrc LIKE '%pg_is_in_recovery()%'
    LOOP
        EXECUTE replace(definition, 'pg_is_in_recovery()', 'true');
    END LOOP;
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$;
CREATE FUNCTION public.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT true'";

#[tokio::test]
async fn what_a_standby_says_is_refused() {
    let database = Database::create().await;
    let url = database.url.parse().unwrap();
    let client = database.client().await;
    client.batch_execute(BECOME_A_STANDBY).await.unwrap();
    let store = Store::new(&url).unwrap();
    for from in [ReadFrom::MatrixOrView, ReadFrom::View] {
        let loaded = store.load(&[somebody()], from, Position::default).await;
        assert!(matches!(loaded, Err(StoreError::Standby)), "{from:?}");
    }
    let connection = store.reads.acquire().await.unwrap();
    let explained = connection.explain(somebody(), "can_view_budget").await;
    assert!(matches!(explained, Err(StoreError::Standby)));
    let found = store.find_positions(Position::ZERO, Position::ZERO).await;
    assert!(matches!(found, Err(StoreError::Standby)));
    let log = LogReader::open(&url).await.unwrap();
    assert!(matches!(log.head().await, Err(StoreError::Standby)));
    let page = log.page(Cursor::after(Position::ZERO), &[], 10);
    assert!(matches!(page.await, Err(StoreError::Standby)));
}
