"""A bundle's files: recipe, manifest, calibration, costs, n-grams, and where checkpoints come from."""
