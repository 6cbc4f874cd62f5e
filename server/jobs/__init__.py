"""Requests that are answered later: kept in SQLite so that none is lost, run in turn, and announced by webhook."""
