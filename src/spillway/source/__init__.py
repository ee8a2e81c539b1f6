"""Everything that talks to the source database, and nothing that knows what a change is for.

- `connect`: the two kinds of connection, with the session settings that fix every byte of a value's text;
- `refusal`: what PostgreSQL's refusals mean, and what mends each;
- `stream`: one START_REPLICATION: frames in, feedback out;
- `slot`: identity of the server, the publication, the slot and its lag;
- `catalog`: what only the catalogue knows of a table;
- `preflight`, `tables`: findings before the run, each with the SQL that mends it.

Nothing here writes to the source but the creation of a publication and a slot, and that only when asked.
"""
