"""``build``, ``generate`` and ``inspect``, and what they print."""
