"""Proving a run's promises by breaking things on purpose."""
