"""OpenAI's Files and Batches: many requests in one file, drawn when nobody else draws, their answers in another."""
