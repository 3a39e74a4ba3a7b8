"""The commands of `sfumato`."""
