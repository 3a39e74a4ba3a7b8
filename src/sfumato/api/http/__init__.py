"""What every request passes, whatever its dialect."""
