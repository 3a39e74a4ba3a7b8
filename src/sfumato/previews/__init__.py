"""Previews of a run in progress: latent-to-RGB previews and tiny decoders."""
