"""Drafters: EAGLE-3 heads, block drafters, prompt lookup, and tokens that grammars force."""
