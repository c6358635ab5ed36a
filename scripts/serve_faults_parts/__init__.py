"""The faults that scripts/serve_faults.py brings about, and what must hold after each."""
