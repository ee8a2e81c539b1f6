"""Spillway: PostgreSQL change data capture whose memory is bounded by construction."""

__version__ = "0.1.0.dev0"
