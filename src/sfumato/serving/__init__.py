"""The service that every front end calls. No torch."""
