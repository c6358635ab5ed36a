"""What the planner believes: it changes only where a learner corrects it.

costs       seconds of passes on this machine
acceptance  P(accept | source, depth, score), and what a level is expected to add
ngrams      continuations that the target has usually written
iteration   both for one iteration: prices in tokens
"""
