"""Sampling: the engine, the HTTP service around it, the client of any such service, scoring."""
