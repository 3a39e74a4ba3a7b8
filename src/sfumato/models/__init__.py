"""Weights: sources, download, load, the pool of loaded models, memory. The embedded model's files lie here too."""
