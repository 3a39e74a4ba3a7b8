"""What a diffusers pipeline takes, does with its scheduler, and can be asked for."""
