"""What to draft and verify, given a model. Nothing here keeps a state between iterations.

candidates  head, copied text and n-grams in one super-tree, with P(accept)
levels      which nodes to expand, before their children are known
nodes       which candidates to verify
"""
