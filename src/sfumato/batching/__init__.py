"""Step batching of any diffusers pipeline: requests park at module calls and share forward passes."""
