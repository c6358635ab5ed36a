"""Requests through time: KV blocks, continuous batching, drafts kept in step, and the offline LLM class."""
