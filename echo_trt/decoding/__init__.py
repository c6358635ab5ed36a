"""ECHO itself (arXiv 2604.09603), as pure functions over arrays. Nothing here knows an engine.

One iteration: draft -> gate (``grow``) -> allocate -> pack -> verify (an engine) -> accept -> commit (the runtime).
"""
