"""Timing, tables, numbers by key, pages: what all rooms have in common."""
