"""HTTP front ends over `service`. No torch: this process answers while the worker computes."""
