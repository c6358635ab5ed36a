"""Compilers and engines: one folder each, behind one protocol (``base``)."""
