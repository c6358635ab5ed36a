"""What a recipe's networks weigh and what a card does with them, from their published shapes: no weights are needed."""
