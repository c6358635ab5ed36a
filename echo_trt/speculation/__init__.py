"""Plan, pack and accept: one iteration of speculative decoding over arrays, independent of any engine.

planner     the protocol: ``plan`` chooses what is drafted and verified, ``observe`` learns from the outcome
drafts      what proposes children; trees that are known beforehand
chains      draft tokens in a row that take no pass
policies    builds a policy's planner by name, with its numbers
echo        the paper (arXiv 2604.09603): gates, grow, pivot, budget
goodput     the default: maximises committed tokens per second, and learns while it runs
super_tree  all requests' draft trees in one set of arrays; ``pack`` makes an engine's call of them
accept      walks down the verified trees
sampling    the target's choice of a token: penalties, draws, log-probabilities
arrays      ragged arrays; ``compiled`` loops
"""
