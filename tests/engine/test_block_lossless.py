"""Block drafters change when tokens come, never which: fp32, greedy and seeded, batches of 1, 4 and 8.

DFlash and DSpark are pairs of the other tests of losslessness, too.
"""

import pytest
from driving import assert_all_free, goodput_planner
from test_goodput_loop import machine, plain_ids, requests  # noqa: F401  # plain_ids is a fixture

FAMILIES = ("jetspec", "rnn", "peagle")


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_policies_write_the_same_tokens(family, batch, open_llm, plain_ids):  # noqa: F811
    llm = open_llm(family, "autoregressive", batch)
    for policy in ("autoregressive", "echo", "static", "goodput", "goodput-exact"):
        if policy.startswith("goodput"):
            llm.loop.planner = goodput_planner(llm, machine(), policy)
        else:
            llm.set_policy(policy)
        drafted = llm.counters.drafted_tokens
        assert [completion.token_ids for completion in llm.generate(*requests())] == plain_ids(family)
        assert (llm.counters.drafted_tokens > drafted) == (policy != "autoregressive")
        assert_all_free(llm.loop)
