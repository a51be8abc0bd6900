-- analyze_permission_performance(): what an operator should look at, each advice following from the value beside it.

-- metric_value: the number that the status follows from; NULL where it is not known. recommendation: NULL unless there
-- is something to do. status: ok, info, warning, critical. detail: goes on where the number and its unit stop.
CREATE TYPE hallpass.finding AS (
    metric_name text,
    metric_value numeric,
    metric_unit text,
    recommendation text,
    status text,
    detail text
);

-- The status of a number that is the worse the greater it is.
CREATE FUNCTION hallpass.graded(number numeric, warning_from numeric, critical_from numeric) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE WHEN number >= critical_from THEN 'critical' WHEN number >= warning_from THEN 'warning' ELSE 'ok' END;
END $$;

-- The advice that a status gives: none unless something is wrong.
CREATE FUNCTION hallpass.advice(status text, recommendation text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE WHEN status IN ('warning', 'critical') THEN recommendation END;
END $$;

-- The tables that the findings speak of, with PostgreSQL's estimate of their rows.
CREATE FUNCTION hallpass.measured_tables() RETURNS TABLE (name regclass, live_rows bigint, dead_rows bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT c.oid::regclass, greatest(s.n_live_tup, c.reltuples::bigint, 0), s.n_dead_tup
    FROM pg_class c JOIN pg_stat_all_tables s ON s.relid = c.oid
    WHERE c.oid = ANY (hallpass.recorded_tables())
       OR c.oid IN ('public.user_permission_matrix'::regclass, 'public.org_permission_summary'::regclass)
       OR c.relnamespace = 'hallpass'::regnamespace AND c.relkind = 'r'
    ORDER BY c.oid::regclass::text;
END $$;

-- Sizes, dead rows, and how much of the tables is read from memory.
CREATE FUNCTION hallpass.findings_of_tables() RETURNS SETOF hallpass.finding
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT 'size: ' || name, bytes::numeric, 'bytes', NULL::text, 'info',
           format('%s rows, %s', live_rows, pg_size_pretty(bytes))
    FROM hallpass.measured_tables(), LATERAL (SELECT pg_total_relation_size(name) AS bytes) s;

    -- A table of a few pages may be as dead as it likes.
    RETURN QUERY
    SELECT 'dead rows: ' || name, share, '%',
           hallpass.advice(grade, format('VACUUM (ANALYZE) %s; look for an old transaction or replication slot that '
                                         'holds dead rows, and at the table''s autovacuum settings', name)),
           grade, format('%s dead beside %s', dead_rows, live_rows)
    FROM hallpass.measured_tables(),
         LATERAL (SELECT round(100.0 * dead_rows / greatest(live_rows + dead_rows, 1)) AS share) s,
         LATERAL (SELECT CASE WHEN dead_rows < 1000 THEN 'ok' ELSE hallpass.graded(share, 30, 60) END AS grade) g;

    RETURN QUERY
    SELECT 'reads from memory', share, '%',
           hallpass.advice(grade, 'raise shared_buffers, or give the machine memory for the tables whose sizes are above'),
           grade, format('of %s blocks', asked)
    FROM (SELECT coalesce(sum(io.heap_blks_hit + io.idx_blks_hit), 0) AS hit,
                 coalesce(sum(io.heap_blks_hit + io.idx_blks_hit + io.heap_blks_read + io.idx_blks_read), 0) AS asked
          FROM hallpass.measured_tables() t JOIN pg_statio_all_tables io ON io.relid = t.name) blocks,
         LATERAL (SELECT round(100 * hit / nullif(asked, 0), 1) AS share) s,
         -- The first reads of all come from disk.
         LATERAL (SELECT CASE WHEN asked < 10000 THEN 'info' ELSE hallpass.graded(100 - share, 5, 20) END AS grade) g;
END $$;

-- Which index is used how often; the audit log's over all its partitions. One that keeps rows unique needs no reader.
CREATE FUNCTION hallpass.findings_of_indexes() RETURNS SETOF hallpass.finding
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT 'index: ' || index, scans, 'scans',
           hallpass.advice(grade, CASE WHEN is_valid
               THEN 'no query has used it since the statistics began: drop it, unless its consumer is only rare'
               ELSE 'it costs writers and serves nobody: DROP INDEX CONCURRENTLY, then build it again' END),
           grade, pg_size_pretty(bytes) || CASE WHEN is_valid THEN '' ELSE ', invalid' END
    FROM (SELECT coalesce(parent.inhparent, i.indexrelid)::regclass AS index, sum(s.idx_scan) AS scans,
                 sum(pg_relation_size(i.indexrelid)) AS bytes, bool_and(i.indisvalid) AS is_valid,
                 bool_and(i.indisunique) AS is_unique, sum(t.live_rows) AS live_rows
          FROM hallpass.measured_tables() t
          JOIN pg_index i ON i.indrelid = t.name
          JOIN pg_stat_all_indexes s ON s.indexrelid = i.indexrelid
          LEFT JOIN pg_inherits parent ON parent.inhrelid = i.indexrelid
          GROUP BY 1) indexes,
         LATERAL (SELECT CASE WHEN NOT is_valid THEN 'critical'
                              WHEN scans = 0 AND NOT is_unique AND live_rows >= 10000 THEN 'warning'
                              ELSE 'ok' END AS grade) g
    ORDER BY index::text;
END $$;

-- How far the materialized views are behind the log, and for how many organizations the matrix is believed.
CREATE FUNCTION hallpass.findings_of_matrix() RETURNS SETOF hallpass.finding
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    refresh CONSTANT text := 'SELECT public.refresh_permission_materialized_views(); and see why no service does it '
                             'every --matrix-refresh-interval';
    organizations CONSTANT uuid[] := ARRAY(SELECT id FROM public.organizations);
    believed CONSTANT integer := cardinality(hallpass.true_in_matrix(organizations));
BEGIN
    RETURN QUERY
    SELECT 'behind the log: public.' || view_name, seconds, 'seconds', hallpass.advice(grade, refresh), grade,
           format('refreshed %s ago%s', date_trunc('second', now() - refreshed_at),
                  CASE WHEN is_empty THEN ', holds nothing' END)
    FROM hallpass.matrix_stamp m,
         LATERAL (SELECT m.seq < 0 OR NOT hallpass.is_populated(('public.' || view_name)::regclass) AS is_empty) e,
         LATERAL (SELECT CASE WHEN NOT is_empty THEN coalesce(
             (SELECT round(extract(epoch FROM greatest(now() - l.committed_at, '0'))) FROM hallpass.log l
              WHERE l.seq > m.seq ORDER BY l.seq LIMIT 1), 0) END AS seconds) s,
         LATERAL (SELECT CASE WHEN is_empty THEN 'critical' ELSE hallpass.graded(seconds, 600, 3600) END AS grade) g
    ORDER BY view_name DESC;

    -- After a change of the catalog it is none, until the next refresh.
    RETURN QUERY
    SELECT 'matrix believed', share, '%', hallpass.advice(grade, refresh), grade,
           format('for %s of %s organizations', believed, cardinality(organizations))
    FROM (SELECT round(100.0 * believed / nullif(cardinality(organizations), 0), 1) AS share) s,
         LATERAL (SELECT hallpass.graded(100 - share, 10, 50) AS grade) g;
END $$;

-- The audit log's partitions and growth, entries on their way, legal holds.
CREATE FUNCTION hallpass.findings_of_log() RETURNS SETOF hallpass.finding
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    first_month CONSTANT timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
    -- Counted so far and no further.
    counted_max CONSTANT integer := 100000;
    made integer;
    months integer;
BEGIN
    SELECT count(*) FILTER (WHERE month_at = ANY (begins)), cardinality(begins) INTO made, months
    FROM (SELECT ARRAY(SELECT p.begins_at FROM hallpass.audit_partitions() p WHERE NOT p.is_default) AS begins) p,
         generate_series(0, 2) ahead,
         LATERAL (SELECT (first_month + make_interval(months => ahead)) AT TIME ZONE 'UTC' AS month_at) m
    GROUP BY begins;
    RETURN QUERY
    SELECT 'audit log: months made', made::numeric, 'months',
           hallpass.advice(grade, 'CALL hallpass.make_audit_partitions(); and see why no service does it every day'),
           grade, format('of this and the next two; %s in all', months)
    FROM (SELECT hallpass.graded(3 - made, 1, 3) AS grade) g;

    RETURN QUERY
    SELECT 'audit log: rows in the DEFAULT partition', counted::numeric, 'rows',
           hallpass.advice(grade, 'they came when their month had no partition: see that a service runs; retention '
                                  'removes them row by row'),
           grade, CASE WHEN counted > counted_max THEN 'or more' ELSE 'in all' END
    FROM (SELECT count(*) AS counted FROM (SELECT FROM hallpass.permission_audit_log_default LIMIT counted_max + 1) r) c,
         LATERAL (SELECT hallpass.graded(counted, 1, counted_max) AS grade) g;

    RETURN QUERY
    SELECT 'audit log: growth',
           round(coalesce(sum(live_rows) FILTER (WHERE ends_at > now() - interval '30 days'), 0)
                 / greatest(extract(epoch FROM now() - greatest(
                       min(begins_at) FILTER (WHERE ends_at > now() - interval '30 days'),
                       (SELECT l.committed_at FROM hallpass.log l ORDER BY l.seq LIMIT 1))) / 86400, 1)),
           'rows a day', NULL::text, 'info', format('lately; %s rows, %s', sum(live_rows), pg_size_pretty(sum(bytes)))
    FROM (SELECT t.live_rows, p.begins_at, p.ends_at, pg_total_relation_size(p.name) AS bytes
          FROM hallpass.audit_partitions() p JOIN hallpass.measured_tables() t ON t.name = p.name) partitions;

    RETURN QUERY
    SELECT 'log: entries not cleared', counted::numeric, 'entries',
           hallpass.advice(grade, 'a service clears hallpass.log_pending at every inspection: see that one runs'),
           grade, CASE WHEN counted > counted_max THEN 'or more' ELSE 'in all' END
    FROM (SELECT count(*) AS counted FROM (SELECT FROM hallpass.log_pending LIMIT counted_max + 1) r) c,
         LATERAL (SELECT hallpass.graded(counted, 10000, counted_max) AS grade) g;

    RETURN QUERY
    SELECT 'legal holds', count(*)::numeric, 'holds',
           CASE WHEN count(*) > 0 THEN 'nothing is removed from the log before lifted_at is set in hallpass.legal_hold' END,
           'info', 'in force'
    FROM hallpass.legal_hold WHERE lifted_at IS NULL;
END $$;

-- Statements about permissions that take 50 ms or more on average; refreshes and upkeep may.
CREATE FUNCTION hallpass.findings_of_statements() RETURNS SETOF hallpass.finding
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    place CONSTANT text := (SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
                            WHERE e.extname = 'pg_stat_statements');
BEGIN
    IF place IS NULL THEN
        RETURN NEXT ('slow statements', NULL, 'statements', 'CREATE EXTENSION pg_stat_statements', 'info',
                     'not known: pg_stat_statements is not installed')::hallpass.finding;
        RETURN;
    END IF;
    RETURN QUERY EXECUTE format($query$
        SELECT 'slow statement: ' || left(regexp_replace(query, '\s+', ' ', 'g'), 120),
               ms, 'ms',
               hallpass.advice(grade, 'EXPLAIN (ANALYZE, BUFFERS) it, and see whether an index above goes unused'),
               grade, format('on average, %%s calls', calls)
        FROM %s.pg_stat_statements,
             LATERAL (SELECT round(mean_exec_time::numeric, 1) AS ms) m,
             LATERAL (SELECT hallpass.graded(ms, 50, 1000) AS grade) g
        WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND mean_exec_time >= 50
          AND query ~* 'hallpass\.|permission|profiles'
          AND query !~* 'refresh|cleanup_old|make_audit|remove_expired|analyze_permission|(^|\n)\s*(create|alter|drop|vacuum)'
        ORDER BY total_exec_time DESC LIMIT 5 $query$, place);
    IF NOT FOUND THEN
        RETURN NEXT ('slow statements', 0, 'statements', NULL, 'ok', 'none takes 50 ms or more')::hallpass.finding;
    END IF;
EXCEPTION WHEN object_not_in_prerequisite_state THEN
    RETURN NEXT ('slow statements', NULL, 'statements', 'add pg_stat_statements to shared_preload_libraries', 'info',
                 'not known: ' || SQLERRM)::hallpass.finding;
END $$;

CALL hallpass.make_room('analyze_permission_performance()');
CREATE FUNCTION public.analyze_permission_performance()
RETURNS TABLE (metric_name text, metric_value numeric, metric_unit text, recommendation text, status text, detail text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT * FROM hallpass.findings_of_tables();
    RETURN QUERY SELECT * FROM hallpass.findings_of_indexes();
    RETURN QUERY SELECT * FROM hallpass.findings_of_matrix();
    RETURN QUERY SELECT * FROM hallpass.findings_of_log();
    RETURN QUERY SELECT * FROM hallpass.findings_of_statements();
END $$;

INSERT INTO hallpass.public_object VALUES ('analyze_permission_performance');
INSERT INTO hallpass.intended_privilege VALUES
    ('hallpass_auditor', 'EXECUTE', 'ROUTINE public.analyze_permission_performance()');

CALL hallpass.reset_privileges();
