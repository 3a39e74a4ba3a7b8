"""Requests that survive the server: stored before they are carried out, and carried out again after a crash."""
