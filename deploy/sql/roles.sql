-- hallpass's roles, each with what it needs and no more.
--
--   hallpass_owner       owns the schema, the tables and the functions; nobody logs in as it
--   hallpass_migrator    runs `hallpass migrate`, as the owner
--   hallpass_service     runs `hallpass serve`
--   hallpass_admin       changes permissions for the admin API (--admin-database-url), through two functions alone
--   hallpass_auditor     reads the log and the audit log
--
-- Run it with psql, once in each database, before or after `hallpass migrate`, as an administrator: a superuser, or a
-- role with CREATEROLE that owns the database and, after migrating, may SET ROLE to the owner. It may be run again.
--
--   psql -X -f deploy/sql/roles.sql 'postgresql://admin@host/database'
--
-- Where the application's tables exist already, hallpass's owner is theirs; name it (on Supabase it is postgres):
--
--   psql -X -v owner=postgres -f deploy/sql/roles.sql 'postgresql://postgres@host/database'
--
-- Whoever can log in as hallpass_migrator can do all that the owner can: of a superuser, everything.
--
-- It sets no passwords. `\password hallpass_service` in psql does, and sends no more than a SCRAM verifier; or let
-- pg_hba.conf admit the operating system's user (peer) or a certificate (cert).
--
-- Which privileges the roles have on hallpass's objects is said by the migrations, next to each object, in
-- hallpass.intended_privilege; ARCHITECTURE.md says what the service's password is worth to a thief.

\set ON_ERROR_STOP on
\set QUIET on
\if :{?owner}
\else
\set owner hallpass_owner
\endif

BEGIN;
SET LOCAL client_min_messages = warning;
SET LOCAL search_path = pg_catalog;
-- For the blocks below, into which psql puts no variables.
SELECT set_config('hallpass.owner', :'owner', true) AS owner, current_database() AS database \gset

DO $$
DECLARE
    owner CONSTANT name := current_setting('hallpass.owner');
    found CONSTANT name := (SELECT tableowner FROM pg_tables WHERE schemaname = 'public' AND tablename = 'profiles');
BEGIN
    IF found <> owner THEN
        RAISE EXCEPTION 'public.profiles belongs to %, not to %', found, owner
            USING HINT = format('Run this with -v owner=%s.', found);
    END IF;
END $$;

SELECT format('CREATE ROLE %I %s', role, login)
FROM (VALUES (:'owner', 'NOLOGIN'), ('hallpass_migrator', 'LOGIN'),
             ('hallpass_service', 'LOGIN'), ('hallpass_admin', 'LOGIN'), ('hallpass_auditor', 'LOGIN')) wanted (role, login)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) \gexec

-- Whatever the migrator makes in this database belongs to the owner; session_user still says who logged in.
DO $$
DECLARE
    owner CONSTANT name := current_setting('hallpass.owner');
BEGIN
    EXECUTE format('GRANT %I TO hallpass_migrator', owner);
    EXECUTE format('ALTER ROLE hallpass_migrator IN DATABASE %I SET role = %L', current_database(), owner);
EXCEPTION WHEN insufficient_privilege THEN
    -- From PostgreSQL 16 on nobody but a superuser can make others members of the role that he is himself.
    RAISE WARNING 'you may not make hallpass_migrator a member of %: let % itself run `hallpass migrate`', owner, owner;
END $$;

-- What PUBLIC has in most databases, for those in which it was taken away; and CREATE, which the owner needs to migrate.
SELECT format('GRANT %s ON DATABASE %I TO %I', privilege, :'database', role)
FROM (VALUES (:'owner', 'CREATE'), (:'owner', 'TEMPORARY'), ('hallpass_migrator', 'CONNECT'),
             ('hallpass_service', 'CONNECT'), ('hallpass_admin', 'CONNECT'), ('hallpass_auditor', 'CONNECT')) needed (role, privilege)
WHERE NOT has_database_privilege(role, :'database', privilege) \gexec

SELECT format('GRANT %s ON SCHEMA public TO %I', privilege, role)
FROM (VALUES (:'owner', 'CREATE'), (:'owner', 'USAGE'),
             ('hallpass_service', 'USAGE'), ('hallpass_admin', 'USAGE'), ('hallpass_auditor', 'USAGE')) needed (role, privilege)
WHERE NOT has_schema_privilege(role, 'public', privilege) \gexec

-- A transaction that nobody ends keeps its locks: the service's would keep the other replicas from refreshing, the
-- auditor's the months of the audit log from being made and removed. The service sets its other limits itself.
ALTER ROLE hallpass_service SET idle_in_transaction_session_timeout = '1min';
ALTER ROLE hallpass_admin SET idle_in_transaction_session_timeout = '1min';
ALTER ROLE hallpass_auditor SET idle_in_transaction_session_timeout = '5min';

SELECT EXISTS (SELECT FROM pg_proc WHERE pronamespace = to_regnamespace('hallpass') AND proname = 'reset_privileges')
    AS is_migrated \gset
\if :is_migrated
SET LOCAL ROLE :"owner";
CALL hallpass.reset_privileges();
\endif
COMMIT;
