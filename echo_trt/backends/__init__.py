"""Compilers and engines, in one folder a compiler, behind one protocol (``base``)."""
