"""The goodput policy: draft and verify what commits most tokens a second, by costs measured on this machine.

ladder      which size is verified at a load, or plain decoding
planner     one iteration: levels while they pay, then the best nodes over the batch
search      what a level would bring before it is drafted
candidates  head, copied text and n-grams in one super-tree, each node with its P(accept)
acceptance  calibrated P(accept | source, depth, score), corrected while it runs
ngrams      continuations that the target has usually written
costs       what passes take on this machine, tracked while it runs
requests    what is remembered of each request: who drafts well, who fell behind
"""
