"""Structured output: grammars that answers must fit, over llguidance, and the states of texts under them."""
