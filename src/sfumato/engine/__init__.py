"""From a validated request to a picture. `worker`, `loop` and what they call import torch; nothing else does."""
