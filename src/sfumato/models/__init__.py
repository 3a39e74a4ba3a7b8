"""Weights in memory: what is loaded, how, in which precision. The built-in model's files are here too."""
