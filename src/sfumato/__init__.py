"""Sfumato: a self-hosted image server on Hugging Face diffusers."""

__version__ = "0.1.0"
