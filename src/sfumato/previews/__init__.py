"""Pictures of a run on its way: latent-to-RGB previews and tiny decoders."""
