"""Ollama's API, as far as it draws: its clients get pictures of every model here."""
