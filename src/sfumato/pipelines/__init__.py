"""What is known about a diffusers pipeline: its parameters, its use of the scheduler, its capabilities."""
