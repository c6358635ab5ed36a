"""ECHO (arXiv 2604.09603) and the goodput policy, over arrays. Nothing here knows an engine.

One iteration: draft -> gate (``grow``) -> allocate -> pack -> verify (an engine) -> accept -> commit (the runtime).

The paper, as pure functions: ``super_tree``, ``policies`` (gates, K_max), ``grow``, ``allocate``, ``pack``, ``accept``,
and the hinge in ``costs``. Goodput, which learns while it runs: ``goodput``, ``foresight``, ``sizes``, ``turns``,
``candidates``, ``ngrams``, ``acceptance``, ``costs``, ``history``. What both draw on: ``sampling``, ``penalties``,
``logprobs``; and to compute with, ``ragged`` arrays and ``compiled`` loops.
"""
