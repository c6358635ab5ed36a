"""A policy in one file: a chain of K draft tokens for each request, whatever the load.

    echo-trt generate BUNDLE "Why is the sky blue?" --policy-file examples/chain_policy.py --policy chain

The function gets the policy's name, the recipe's ``decoding`` section, and a function that makes a goodput planner. A
planner is an object with ``name`` and ``plan`` (``echo_trt.speculation.planner.Planner``); here the paper's does,
without gates and without a budget for the batch. A policy changes speed alone: the target verifies each token.
"""

from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.policies import policy

K = 3


def shape(settings):
    """Return the largest trees: K levels of one node each, and the root."""
    return EchoSettings(max_depth=K, beams=1, width=1, per_request=K + 1)


@policy("chain", f"a chain of {K} tokens", shape)
def chain(name, settings, make_goodput):
    return EchoPlanner(name, shape(settings))
