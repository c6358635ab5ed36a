"""Compilers and engines, in one folder per compiler, behind one protocol (``base``)."""
