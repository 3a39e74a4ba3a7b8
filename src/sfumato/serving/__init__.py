"""What every front end calls. No torch."""
