-- The named queries of spillway.source. One text for PostgreSQL 12 to 18: a column that only newer servers have is
-- read out of the row's JSON (to_jsonb(row) ->> 'column' is null where there is none).
-- Every name is schema-qualified or in pg_catalog: the session's search_path is empty.

-- name: server
-- What preflight wants to know of the server and of us.
SELECT current_setting('wal_level') AS wal_level,
       current_setting('max_replication_slots')::int AS max_replication_slots,
       (SELECT count(*) FROM pg_replication_slots)::int AS replication_slots,
       current_setting('max_wal_senders')::int AS max_wal_senders,
       current_setting('max_slot_wal_keep_size', true) AS max_slot_wal_keep_size,
       pg_is_in_recovery() AS standby,
       current_database()::text AS database,
       r.rolname::text AS role,
       r.rolsuper AS superuser,
       has_database_privilege(current_database(), 'CREATE') AS may_create
  FROM pg_roles r
 WHERE r.rolname = current_user;

-- name: slot
SELECT s.slot_type, s.plugin::text, s.database::text, s.active_pid, a.application_name AS active_application,
       s.confirmed_flush_lsn::text, s.restart_lsn::text,
       to_jsonb(s) ->> 'wal_status' AS wal_status,
       CASE WHEN to_jsonb(s) ->> 'invalidation_reason' IS NOT NULL THEN to_jsonb(s) ->> 'invalidation_reason'
            WHEN (to_jsonb(s) ->> 'conflicting')::boolean THEN 'conflicting'
            WHEN to_jsonb(s) ->> 'wal_status' = 'lost' THEN 'wal_removed'
       END AS invalidation
  FROM pg_replication_slots s
  LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
 WHERE s.slot_name = %(slot)s;

-- name: slot_transactions
-- From 14 on: how many transactions the slot has decoded since its creation.
SELECT total_txns FROM pg_stat_replication_slots WHERE slot_name = %(slot)s;

-- name: lag
SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text AS now,
       s.confirmed_flush_lsn::text AS confirmed
  FROM pg_replication_slots s
 WHERE s.slot_name = %(slot)s;

-- name: slot_creation_waits_for
-- Whoever has an xid may be waited for while a slot is created, the oldest longest.
SELECT 'pid ' || a.pid || ' (' || coalesce(a.usename::text, '?') || ', ' || coalesce(a.state, '?') || ')' AS who,
       'SELECT pg_terminate_backend(' || a.pid || ');' AS remedy, a.xact_start AS since
  FROM pg_stat_activity a
 WHERE a.backend_xid IS NOT NULL
 UNION ALL
SELECT 'prepared transaction ' || quote_literal(x.gid), 'ROLLBACK PREPARED ' || quote_literal(x.gid) || ';', x.prepared
  FROM pg_prepared_xacts x
 ORDER BY since
 LIMIT 1;

-- name: publication
SELECT p.puballtables AS all_tables, p.pubinsert AS "insert", p.pubupdate AS "update", p.pubdelete AS "delete",
       p.pubtruncate AS "truncate", coalesce((to_jsonb(p) ->> 'pubviaroot')::boolean, false) AS via_root
  FROM pg_publication p
 WHERE p.pubname = %(publication)s;

-- name: published
-- The tables of a publication under the names that the stream gives them. A publication's table depends on the columns
-- of its filter and of its list alike: with a list, which are the filter's is not asked.
SELECT c.oid,
       to_jsonb(p) -> 'attnames' AS published_columns,
       to_jsonb(p) ->> 'rowfilter' AS row_filter,
       (SELECT array_agg(a.attname::text ORDER BY a.attnum)
          FROM pg_publication q
          JOIN pg_publication_rel r ON r.prpubid = q.oid AND r.prrelid = c.oid
          JOIN pg_depend d ON d.classid = 'pg_publication_rel'::regclass AND d.objid = r.oid
                          AND d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
         WHERE q.pubname = p.pubname AND to_jsonb(r) ->> 'prqual' IS NOT NULL
           AND to_jsonb(r) ->> 'prattrs' IS NULL) AS filter_columns
  FROM pg_publication_tables p
  JOIN pg_namespace n ON n.nspname = p.schemaname
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
 WHERE p.pubname = %(publication)s;

-- name: publishable
-- What FOR ALL TABLES would publish.
SELECT c.oid
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relpersistence = 'p'
   AND CASE WHEN %(via_root)s THEN c.relkind IN ('r', 'p') AND NOT c.relispartition ELSE c.relkind = 'r' END
   AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\_toast%%';

-- name: existing
-- Which of the named tables exist; owned: we may put them into a publication.
SELECT n.nspname::text AS schema, c.relname::text AS "table", c.oid, c.relkind::text AS kind,
       pg_has_role(c.relowner, 'USAGE') AS owned
  FROM unnest(%(schemas)s::text[], %(tables)s::text[]) AS wanted (schema, name)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
 WHERE c.relkind IN ('r', 'p');

-- name: unreadable
-- Tables and views of these names that we may not SELECT from, where they would be found or in a schema of these names.
SELECT n.nspname::text AS schema, c.relname::text AS "table"
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relname = ANY(%(names)s::text[]) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
   AND (n.nspname = ANY(%(names)s::text[]) OR n.nspname = 'public' OR n.nspname = ANY(current_schemas(false)))
   AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'))
 ORDER BY 1, 2;

-- name: tables
SELECT c.oid, n.nspname::text AS schema, c.relname::text AS "table", c.relkind::text AS kind,
       c.relreplident::text AS replica_identity,
       root.schema AS root_schema, root."table" AS root_table,
       has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable,
       coalesce(a.columns, '{}') AS columns,
       coalesce(a.primary_key, '{}') AS primary_key,
       -- Of interest only where the table does hold values out of line.
       CASE WHEN pg_relation_size(nullif(c.reltoastrelid, 0)) > 0 THEN a.toastable END AS toastable,
       coalesce(CASE c.relreplident WHEN 'f' THEN a.columns WHEN 'd' THEN a.primary_key WHEN 'i' THEN a.identity_index END,
                '{}') AS identity_columns
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN LATERAL (
       SELECT m.nspname::text AS schema, r.relname::text AS "table"
         FROM pg_class r
         JOIN pg_namespace m ON m.oid = r.relnamespace
        WHERE c.relispartition AND r.oid = pg_partition_root(c.oid)) root ON true
 CROSS JOIN LATERAL (
       SELECT array_agg(k.attname::text ORDER BY k.attnum) AS columns,
              array_agg(k.attname::text ORDER BY k.attnum) FILTER (WHERE k.in_primary_key) AS primary_key,
              array_agg(k.attname::text ORDER BY k.attnum) FILTER (WHERE k.in_identity_index) AS identity_index,
              array_agg(k.attname::text ORDER BY k.attnum) FILTER (WHERE k.attstorage IN ('x', 'e')) AS toastable
         FROM (SELECT t.attname, t.attnum, t.attstorage,
                      EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t.attrelid AND i.indisprimary
                                 AND array_position(i.indkey::int2[], t.attnum) < i.indnkeyatts) AS in_primary_key,
                      EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t.attrelid AND i.indisreplident
                                 AND array_position(i.indkey::int2[], t.attnum) < i.indnkeyatts) AS in_identity_index
                 FROM pg_attribute t
                WHERE t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped) k) a
 WHERE c.oid = ANY (%(oids)s::oid[])
 ORDER BY schema, "table";

-- name: leaves
-- The partitions that hold the rows of partitioned tables, at any depth: their replica identity is what counts.
SELECT r.oid AS root, p.relid::oid AS leaf
  FROM unnest(%(oids)s::oid[]) AS r (oid)
 CROSS JOIN LATERAL pg_partition_tree(r.oid) p
 WHERE p.isleaf AND p.relid <> r.oid;

-- name: columns
-- A table as the stream describes it: generated columns are left out there up to 17.
SELECT t.attname::text AS name, t.atttypid AS type_oid, t.attgenerated <> '' AS generated,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t.attrelid AND i.indisprimary
                  AND array_position(i.indkey::int2[], t.attnum) < i.indnkeyatts) AS in_primary_key
  FROM pg_attribute t
 WHERE t.attrelid = %(oid)s AND t.attnum > 0 AND NOT t.attisdropped
 ORDER BY t.attnum;

-- name: column_types
-- By what a column's values are made of: the base of a domain, the elements of an array.
WITH RECURSIVE made (number, name, oid) AS (
    SELECT t.attnum, t.attname::text, t.atttypid
      FROM pg_attribute t
     WHERE t.attrelid = %(oid)s AND t.attnum > 0 AND NOT t.attisdropped
     UNION ALL
    SELECT made.number, made.name, CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.typelem END
      FROM made
      JOIN pg_type t ON t.oid = made.oid
     WHERE t.typtype = 'd' OR EXISTS (SELECT FROM pg_type e WHERE e.oid = t.typelem AND e.typarray = t.oid)
)
SELECT made.name, CASE WHEN t.typtype = 'e' THEN 'enum' ELSE format_type(t.oid, NULL) END AS type
  FROM made
  JOIN pg_type t ON t.oid = made.oid
 WHERE t.typtype <> 'd' AND NOT EXISTS (SELECT FROM pg_type e WHERE e.oid = t.typelem AND e.typarray = t.oid)
 ORDER BY made.number;

-- name: root
-- Of a partition; null of another table.
SELECT c.relkind = 'p' AS partitioned, n.nspname::text AS schema, r.relname::text AS "table"
  FROM pg_class c
  LEFT JOIN pg_class r ON c.relispartition AND r.oid = pg_partition_root(c.oid)
  LEFT JOIN pg_namespace n ON n.oid = r.relnamespace
 WHERE c.oid = %(oid)s;

-- name: types
-- Every type that is reachable: what a domain stands for, what an array holds, what a composite is made of. An array
-- is a type that its element calls its array; point, name and int2vector have an element too and are none.
WITH RECURSIVE reachable (oid) AS (
    SELECT unnest(%(oids)s::oid[])
     UNION
    SELECT next.oid
      FROM reachable
      JOIN pg_type t ON t.oid = reachable.oid
     CROSS JOIN LATERAL (
           SELECT t.typbasetype WHERE t.typtype = 'd'
            UNION ALL
           SELECT e.oid FROM pg_type e WHERE e.oid = t.typelem AND e.typarray = t.oid
            UNION ALL
           SELECT f.atttypid FROM pg_attribute f
            WHERE t.typtype = 'c' AND f.attrelid = t.typrelid AND f.attnum > 0 AND NOT f.attisdropped
           ) AS next (oid)
)
SELECT t.oid, t.typname::text AS name, t.typtype::text AS kind, t.typbasetype AS base_oid,
       coalesce(e.oid, 0)::oid AS element_oid, coalesce(e.typdelim::text, ',') AS delimiter,
       coalesce(f.names, '{}') AS attribute_names, coalesce(f.types, '{}') AS attribute_types
  FROM reachable
  JOIN pg_type t ON t.oid = reachable.oid
  LEFT JOIN pg_type e ON e.oid = t.typelem AND e.typarray = t.oid
  LEFT JOIN LATERAL (
       SELECT array_agg(f.attname::text ORDER BY f.attnum) AS names, array_agg(f.atttypid ORDER BY f.attnum) AS types
         FROM pg_attribute f
        WHERE t.typtype = 'c' AND f.attrelid = t.typrelid AND f.attnum > 0 AND NOT f.attisdropped) f ON true;

-- name: page
-- What the transaction of a page sees, where it stands, and the table's shape: whatever decides how its rows are asked
-- for and rendered, to be compared as text. Of the publication these are stamps; `published_table` reads it out.
-- An index's key is unique as a primary key, or begins with the sort column in ascending order.
SELECT txid_current_snapshot()::text AS snapshot,
       pg_is_in_recovery() AS standby,
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
            WHEN to_regproc('pg_catalog.aurora_version') IS NOT NULL THEN pg_current_wal_lsn()
            ELSE pg_current_wal_insert_lsn()
       END::text AS lsn,
       (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS microseconds,
       (SELECT jsonb_build_object(
               'oid', c.oid::bigint,
               'kind', c.relkind,
               'file', pg_relation_filenode(c.oid)::bigint,
               'root', (SELECT jsonb_build_array(n.nspname, r.relname)
                          FROM pg_class r JOIN pg_namespace n ON n.oid = r.relnamespace
                         WHERE c.relispartition AND r.oid = pg_partition_root(c.oid)),
               'columns', (
                   SELECT jsonb_agg(jsonb_build_object(
                              'number', a.attnum, 'name', a.attname, 'type_oid', a.atttypid::bigint,
                              'type_modifier', a.atttypmod, 'type', format_type(a.atttypid, a.atttypmod),
                              'generated', a.attgenerated <> '', 'not_null', a.attnotnull,
                              'collation', (SELECT jsonb_build_array(n.nspname, o.collname)
                                              FROM pg_collation o JOIN pg_namespace n ON n.oid = o.collnamespace
                                             WHERE o.oid = a.attcollation)) ORDER BY a.attnum)
                     FROM pg_attribute a
                    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
               'indexes', (
                   SELECT jsonb_agg(jsonb_build_object('primary', i.indisprimary, 'key', (
                              SELECT jsonb_agg(jsonb_build_object('number', k.number, 'operators', (
                                         SELECT jsonb_object_agg(m.amopstrategy,
                                                                 jsonb_build_array(n.nspname, o.oprname))
                                           FROM pg_opclass f
                                           JOIN pg_amop m ON m.amopfamily = f.opcfamily AND m.amoppurpose = 's'
                                                         AND m.amoplefttype = f.opcintype
                                                         AND m.amoprighttype = f.opcintype
                                           JOIN pg_operator o ON o.oid = m.amopopr
                                           JOIN pg_namespace n ON n.oid = o.oprnamespace
                                          WHERE f.oid = k.operator_class)) ORDER BY k.place)
                                FROM unnest(i.indkey::int2[], i.indclass::oid[])
                                     WITH ORDINALITY AS k (number, operator_class, place)
                               WHERE k.place <= i.indnkeyatts)) ORDER BY i.indisprimary DESC, i.indexrelid)
                     FROM pg_index i
                     JOIN pg_class x ON x.oid = i.indexrelid
                     JOIN pg_am m ON m.oid = x.relam AND m.amname = 'btree'
                    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indisready AND i.indpred IS NULL
                      AND (i.indisprimary OR EXISTS (
                               SELECT FROM pg_attribute a
                                WHERE a.attrelid = c.oid AND a.attnum = i.indkey[0] AND a.attname = %(sort_column)s
                                  AND a.attcollation = i.indcollation[0] AND i.indoption[0] = 0))),
               'publication', (
                   SELECT jsonb_build_array(
                              to_jsonb(p),
                              (SELECT jsonb_agg(to_jsonb(r) ORDER BY r.oid)
                                 FROM pg_publication_rel r
                                WHERE r.prpubid = p.oid
                                  AND (r.prrelid = c.oid
                                       OR r.prrelid IN (SELECT relid FROM pg_partition_ancestors(c.oid)))),
                              (SELECT jsonb_agg(d.objid::bigint ORDER BY d.objid)
                                 FROM pg_depend d
                                WHERE d.refclassid = 'pg_publication'::regclass AND d.refobjid = p.oid
                                  AND d.classid <> 'pg_publication_rel'::regclass))
                     FROM pg_publication p
                    WHERE p.pubname = %(publication)s))::text
          FROM pg_class c
          JOIN pg_namespace s ON s.oid = c.relnamespace
         WHERE s.nspname = %(schema)s AND c.relname = %(table)s) AS shape;

-- name: published_table
-- One table of a publication: the columns that are published (null before 15, which has all), and which rows.
SELECT to_jsonb(p) -> 'attnames' AS published_columns, to_jsonb(p) ->> 'rowfilter' AS row_filter
  FROM pg_publication_tables p
 WHERE p.pubname = %(publication)s AND p.schemaname = %(schema)s AND p.tablename = %(table)s;

-- name: replayed
-- Of a standby: what it has replayed.
SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() END::text AS lsn;

-- name: flushed
SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END::text AS lsn;

-- name: running
-- Transactions of this database that have an id. Whose they are may not be known to us: then they count.
SELECT l.transactionid::text::bigint AS xid,
       coalesce('pid ' || a.pid || ' (' || coalesce(a.usename::text, '?') || ', ' || coalesce(a.state, '?') || ')',
                'prepared transaction ' || quote_literal(x.gid), 'pid ' || coalesce(l.pid::text, '?')) AS who
  FROM pg_locks l
  LEFT JOIN pg_stat_activity a ON a.pid = l.pid
  LEFT JOIN pg_prepared_xacts x ON x.transaction = l.transactionid
 WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted AND NOT pg_is_in_recovery()
   AND coalesce(a.datname, x.database, current_database()) = current_database();

-- name: reader
SELECT pg_is_in_recovery() AS standby, s.setting::float8 / 1000 AS wal_writer_delay_seconds
  FROM pg_settings s
 WHERE s.name = 'wal_writer_delay';

-- name: system_id
SELECT system_identifier::text FROM pg_control_system();

-- name: size
-- Blocks and, if the table was ever analyzed, rows to a block. A partitioned table's are its leaves' together.
SELECT sum(pg_relation_size(l.oid)) / current_setting('block_size')::int AS blocks,
       sum(c.reltuples) FILTER (WHERE c.reltuples > 0) / nullif(sum(c.relpages) FILTER (WHERE c.reltuples > 0), 0)
           AS rows_to_a_block
  FROM (SELECT %(oid)s::oid AS oid
         UNION
        SELECT relid FROM pg_partition_tree(%(oid)s::oid) WHERE isleaf) l
  JOIN pg_class c ON c.oid = l.oid AND c.relkind = 'r';

-- name: commit_timestamps
SELECT current_setting('track_commit_timestamp')::boolean AS kept;

-- name: horizon
SELECT txid_current_snapshot()::text AS snapshot;

-- name: key_arrays
-- The primary key in column order, with the types of arrays of its columns; 0 for a column that is an array itself.
SELECT a.attname::text AS name, t.typarray AS array_oid, t.typdelim::text AS delimiter
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
  JOIN pg_attribute a ON a.attrelid = c.oid AND array_position(i.indkey::int2[], a.attnum) < i.indnkeyatts
  JOIN pg_type t ON t.oid = a.atttypid
 WHERE n.nspname = %(schema)s AND c.relname = %(table)s
 ORDER BY a.attnum;

-- name: timestamp_columns
-- Columns of a table, or of its root, of type timestamp or timestamptz, or of a domain over one; also arrays of these.
WITH RECURSIVE based (attname, oid) AS (
    SELECT a.attname, coalesce(nullif(t.typelem, 0), t.oid)
      FROM pg_attribute a
      JOIN pg_type t ON t.oid = a.atttypid
      JOIN pg_class c ON c.oid = a.attrelid
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND a.attnum > 0 AND NOT a.attisdropped
     UNION
    SELECT b.attname, t.typbasetype FROM based b JOIN pg_type t ON t.oid = b.oid WHERE t.typtype = 'd'
)
SELECT attname::text AS name FROM based WHERE oid IN ('timestamp'::regtype, 'timestamptz'::regtype);

-- name: published_as
-- Whether a table of another OID is published, by itself or by its partitions, under this name.
SELECT EXISTS (
    SELECT
      FROM pg_publication_tables p
      JOIN pg_namespace n ON n.nspname = p.schemaname
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
      JOIN pg_class r ON r.oid IN (c.oid, pg_partition_root(c.oid))
      JOIN pg_namespace s ON s.oid = r.relnamespace
     WHERE p.pubname = %(publication)s AND s.nspname = %(schema)s AND r.relname = %(table)s AND c.oid <> %(oid)s
) AS found;

-- name: unpublished
-- Of tables as they were taken: the names under which nothing is published any more, though the table is still there,
-- or another of its name; and what it is called now (of a partition: its root).
SELECT DISTINCT ON (w.schema, w.name)
       w.schema, w.name AS "table", n.nspname::text AS now_schema, r.relname::text AS now_table
  FROM unnest(%(oids)s::oid[], %(schemas)s::text[], %(tables)s::text[]) AS w (oid, schema, name)
  LEFT JOIN pg_class c ON c.oid = w.oid
  LEFT JOIN pg_class r ON r.oid = coalesce(pg_partition_root(c.oid), c.oid)
  LEFT JOIN pg_namespace n ON n.oid = r.relnamespace
 WHERE (r.oid IS NOT NULL OR to_regclass(format('%%I.%%I', w.schema, w.name)) IS NOT NULL)
   AND (w.schema, w.name) NOT IN (
       SELECT s.nspname, t.relname
         FROM pg_publication_tables p
         JOIN pg_namespace pn ON pn.nspname = p.schemaname
         JOIN pg_class pc ON pc.relnamespace = pn.oid AND pc.relname = p.tablename
         JOIN pg_class t ON t.oid IN (pc.oid, pg_partition_root(pc.oid))
         JOIN pg_namespace s ON s.oid = t.relnamespace
        WHERE p.pubname = %(publication)s)
 ORDER BY w.schema, w.name, w.oid DESC;
