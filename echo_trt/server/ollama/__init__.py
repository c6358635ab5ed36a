"""Ollama's API: its requests as chats, answers to chats in its shape, and what it reports of a model."""
