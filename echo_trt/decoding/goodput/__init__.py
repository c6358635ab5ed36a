"""The goodput policy: draft and verify what commits most tokens a second, by costs measured on this machine.

ladder      chooses the size that is verified at a load, or plain decoding
planner     one iteration: levels while they pay, then the best nodes over the batch
search      values a level before it is drafted
candidates  head, copied text and n-grams in one super-tree, with P(accept)
acceptance  P(accept | source, depth, score): calibrated or not, and learnt while it runs
fit         what was verified lately, as a logistic fit
ngrams      continuations that the target has usually written
costs       seconds of passes on this machine, tracked while it runs
requests    running statistics of requests: who drafts well, who fell behind
"""
