"""Sizes of a recipe's networks and their fit on a card, from published shapes: no weights are needed."""
