"""The HTTP server: OpenAI's and Anthropic's APIs, the live page and metrics."""
