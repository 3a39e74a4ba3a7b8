"""Faster ways to compute the forward pass of a module. It stays as it is, and computes what they cannot."""
