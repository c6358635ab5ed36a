"""ECHO as the paper has it (arXiv 2604.09603), over arrays.

gates    sparse confidence gates: may a request go deeper?
grow     draft level by level, gate, and claim depth from the budget
budget   the hinge cost model and its knee, K_max
pivot    allocate: claimed depth first, then width with what is left
planner  the three together; ``static`` is the same code with other settings

Acceptance is common to all planners: ``echo_trt.speculation.accept``.
"""
