"""Sizes of a recipe's networks and the memory that they need, from published shapes: no weights are needed."""
