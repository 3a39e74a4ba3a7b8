"""AUTOMATIC1111's API, as much of it as its clients call."""
