"""Backfills on real servers, judged by the oracle: under load, on the schedules that break naive ones, killed, refused.

`rows` has the tables and their load, `stage` the process with its sinks and what came out of them.
"""
