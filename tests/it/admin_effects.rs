//! What a try says where there is much to say, and changes of the application's own tables.

use std::time::Instant;

use crate::{
    admin::{
        Administrator, config_to_change, delete_template, grant, lincoln, put_member, reason,
        remove_member, reset, set, start,
    },
    database::Shape,
    pto::Pto,
    server::{APPROVE, Server, head, resolve, run_sql},
    sql::value,
};

/// Members of an organization, each role's in turn.
const MANY: &str = "
INSERT INTO profiles (user_id, org_id, role)
SELECT gen_random_uuid(), :lincoln, (ARRAY['volunteer', 'committee_lead', 'board_member', 'admin'])[1 + n % 4]
FROM generate_series(1, 10000) n";

const FIRST: &str = "
SELECT string_agg(user_id::text, ',' ORDER BY user_id) FROM (
    SELECT user_id FROM profiles WHERE role IN ('volunteer', 'committee_lead') AND org_id = :lincoln
    ORDER BY user_id LIMIT 100) first";

#[tokio::test]
async fn a_try_on_ten_thousand_members_is_exact() {
    let (_database, client, server, mut administrator) = start().await;
    run_sql(&client, MANY).await;
    let before = head(&client).await;
    let began = Instant::now();
    let change = set(APPROVE, "volunteer", true, &[]);
    let tried = administrator.call(change, true).await.unwrap();
    println!("tried in {:?}", began.elapsed());
    assert_eq!(head(&client).await, before);
    let [effect] = &*tried.effects else {
        panic!("{:?}", tried.effects);
    };
    // Half of the many, and cam and vic.
    assert_eq!((effect.gained, effect.lost), (5_002, 0));
    assert_eq!(effect.organization_id, lincoln());
    let first = value(&client, &resolve(FIRST)).await;
    assert_eq!(effect.gaining_user_ids.join(","), first);
    server.stop().await;
}

#[tokio::test]
async fn a_try_lists_a_thousand_effects_and_names_users_in_a_hundred() {
    let (_database, client, server, mut administrator) = start().await;
    run_sql(
        &client,
        "INSERT INTO organizations (id, name) SELECT gen_random_uuid(), 'one of many' FROM generate_series(1, 1100);
         INSERT INTO profiles (user_id, org_id, role) SELECT gen_random_uuid(), id, 'admin' FROM organizations",
    )
    .await;
    let tried = administrator.call(delete_template(APPROVE), true).await;
    let tried = tried.unwrap();
    assert_eq!((tried.effect_count, tried.effects.len()), (1_102, 1_000));
    for (index, effect) in tried.effects.iter().enumerate() {
        assert!(effect.lost >= 1, "{effect:?}");
        let names_users = !effect.losing_user_ids.is_empty();
        assert_eq!(names_users, index < 100, "{index}: {effect:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn an_adopted_database_is_changed_in_its_own_shape() {
    for pto in Pto::ALL {
        let database = pto.adopted().await;
        let client = database.client().await;
        let server = Server::start(config_to_change(&database)).await;
        let mut administrator = Administrator::of(&server);
        let profiles = "SELECT count(*) FROM profiles";
        let before = value(&client, profiles).await;
        for (change, said) in [
            (set(APPROVE, "admin", true, &[]), "deny ROLE_TOO_LOW"),
            (grant("bob", APPROVE), "allow GRANTED_TO_USER"),
            (remove_member("bob"), "deny NOT_A_MEMBER"),
            (put_member("bob", "admin"), "allow GRANTED_BY_ROLE"),
            (put_member("bob", "volunteer"), "allow GRANTED_TO_USER"),
            (reset(APPROVE), "deny ROLE_TOO_LOW"),
        ] {
            let tried = administrator.call(change.clone(), true).await;
            tried.unwrap_or_else(|status| panic!("{pto:?} {change:?}: {status:?}"));
            administrator.make(change.clone()).await.unwrap();
            let found = server.check_now("lincoln", "bob", APPROVE).await;
            assert_eq!(found.said, said, "{pto:?} {change:?}");
        }
        // The profile that lost its organization is the one that has it again.
        assert_eq!(value(&client, profiles).await, before, "{pto:?}");
        if pto.shape == Shape::B {
            let nobody = administrator.make(put_member("nobody", "admin")).await;
            assert_eq!(reason(&nobody.unwrap_err()), "MEMBER_NOT_FOUND");
        }
        server.stop().await;
    }
}
