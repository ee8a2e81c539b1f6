"""Re-indexes on a real OpenSearch and PostgreSQL: under load, killed, cancelled, refused."""
