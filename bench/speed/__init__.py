"""How fast Spillway is, and the peers beside it in the same run: ``python bench/speed [PART ...]``.

**Time of a drain.** For every tool it begins when the server starts to send: the walsender's ``START_REPLICATION``, by
the server's own clock (``pg_stat_activity.query_start``), so that nobody's interpreter or JVM counts. It ends

- for Spillway when every sink has acknowledged every row: ``delivered`` of ``GET /api/status`` has reached the number
  of rows. It is asked seldom (four times a second) until the end is near, and then every 10 ms (`speed.life`);
- for ``pg_recvlogical`` when it has ended, for the bare reader when it has seen the end.

``gross`` is from the start of the process to the same end. Some peers' modules time what suits them better, and are
taken as they are: Debezium from its first batch on, pgsync from its first documents on, the bulk client from its first
request on.

**CPU** is user and system time of the process, by the kernel's clock of it; of Spillway since START_REPLICATION, its
start beside it; of peers over their whole life. **Memory** is VmHWM.

**Rounds.** Tools take turns within a round (product, peer, peer, ...; then again), each with a slot of its own at the
same place. A ratio is taken within a round; what is judged is the median of the rounds' ratios.

**Honesty.** A drain whose rows are not all there (delivered, and counted again behind the sink where that can be), a
process that ended by itself, a writer that could not hold its rate: the part fails, is reported as failed, and gives no
figure. The bench then ends with 1, as it does when a bound does not hold.

::

    parts.py     what can be asked for, in order; each is a module with run(bench)
    results.py   samples, their medians, ratios, what is written as JSON
    bench.py     what the parts share: source, rounds, peers in turn
    life.py      one life of the product and what it costs
    receiver.*   the webhook's far side
    report.py    the bounds of the issue, the tables; plots.py the pictures
"""
