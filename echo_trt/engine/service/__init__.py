"""The service: one thread that owns an engine and answers the requests of others."""
