"""The engine's process: its socket, the messages on it, and what they say of requests."""
