"""Picture bytes: decoding, recipes, storage, downloading. No torch."""
