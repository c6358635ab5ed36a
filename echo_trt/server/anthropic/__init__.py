"""Anthropic's Messages API: its requests as chats, and answers to chats in its shape."""
