"""Run a compiled engine: one protocol (base.py), one file a runtime."""
