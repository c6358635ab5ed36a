"""The target's choice of a token: penalties, top-k and top-p, seeded draws, log-probabilities."""
