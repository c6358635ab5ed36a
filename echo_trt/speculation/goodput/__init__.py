"""The goodput policy: draft and verify what commits most tokens per second, by costs measured on this machine.

planner    one iteration: the ladder's size, draft levels while they pay, then the best nodes over the batch
ladder     measures verification sizes against plain decoding, and holds the best one
model      what a pass costs, and what a node is worth
optimiser  given a model: which levels to draft, and which nodes to verify
learner    corrects the model by what came of an iteration
settings   bounds of the search, and every tuned value
"""
