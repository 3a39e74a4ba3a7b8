"""Clips over HTTP: OpenAI's Videos API as vLLM-Omni types it, and LocalAI's `/video`."""
