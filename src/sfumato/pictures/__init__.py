"""Picture bytes: decoding, recipes, files, fetching. No torch."""
