"""Weights on disk, on the hub or behind a URL: what they are, and how they come onto this disk."""
