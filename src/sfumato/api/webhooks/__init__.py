"""Webhooks: who asked is told when a job or a batch has ended, by the Standard Webhooks scheme."""
