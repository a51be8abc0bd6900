-- Supabase's roles. They are the cluster's: a test of another database may have made some of them.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['anon', 'authenticated', 'service_role', 'authenticator', 'pto_owner'] LOOP
        BEGIN
            EXECUTE 'CREATE ROLE ' || name;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
    END LOOP;
END $$;

-- What the application's server is behind the API: no policy concerns it.
ALTER ROLE service_role BYPASSRLS;

-- The API's login, which becomes one of the three.
ALTER ROLE authenticator LOGIN NOINHERIT;

-- Supabase's `postgres`: owns the database and all in public, is no superuser, and no policy concerns it. It adopts.
ALTER ROLE pto_owner LOGIN BYPASSRLS;

GRANT anon, authenticated, service_role TO authenticator, pto_owner;
