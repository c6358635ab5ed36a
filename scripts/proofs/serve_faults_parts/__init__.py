"""The faults that scripts/proofs/serve_faults.py brings about, and what must hold after each."""
