"""The engine in a child process: supervisor, worker, and the messages between them."""
