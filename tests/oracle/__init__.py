"""The judge of Spillway: black-box, and sharing no code with what it judges.

Nothing here imports ``spillway``. Evidence comes from two places alone:

- the source: its committed history, read by a ``test_decoding`` slot of our own (`history`), and its tables;
- the far side of a sink: what a recording endpoint received (`recorder`, a process of its own that writes every
  request to an append-only file before it answers), what stands in the file, the SQLite table or the index.

`rules` compares the two and returns violations; ``test_rules.py`` shows each rule failing on a history made up to
break it. `reads` adds the rules for existing rows that come beside the stream. `proxy` stands before a real server and
writes down when each request came. `product` starts, kills and measures the process under judgement through its command
line, its HTTP endpoints and ``/proc``.

The one thing taken from the product's messages is where they claim to stand (``commit_lsn``, ``commit_idx``): the
claim is looked up in the history and the whole message compared with what was committed there.
"""
