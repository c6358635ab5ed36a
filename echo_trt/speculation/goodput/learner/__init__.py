"""What an iteration teaches.

learner   passes an iteration's outcome on to all of these
costs     corrects cost curves by timed passes
sources   corrects P(accept) of each source by verified nodes, and sums up what sources bring
fit       logistic regression over the nodes that were verified lately
requests  running statistics of requests: who fell behind, who was not drafted for
"""
