"""Weights: sources, download, load, the pool of loaded models, memory. The built-in model's files are here too."""
