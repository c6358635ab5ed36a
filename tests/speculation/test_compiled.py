"""The loops that numba compiles: the same answers where numba is missing, and where nothing can be cached."""

import os
import subprocess
import sys

ANSWERS = """
import sys
if {missing}:
    sys.modules["numba"] = None
import numpy as np
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.optimiser.levels import best_expansion, expansion_sizes
from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.sampling.draw import sample
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask
from echo_trt.engine.drafters.lookup import _latest_match
from echo_trt.engine.sources.answers import _chain, _learn
rng = np.random.default_rng(0)
tree = SuperTree.from_roots(rng.integers(0, 9, 3))
for _ in range(4):
    parent = rng.integers(0, len(tree), 5)
    tree.add(parent, rng.integers(0, 9, 5), tree.score[parent] + np.log(rng.uniform(0.1, 1, 5)))
tree, _ = tree.sorted_by_request(np.arange(len(tree)))
print(ancestor_mask(tree)[0].tolist(), ragged_arange(rng.integers(0, 5, 40)).tolist())
acceptance = Acceptance.uncalibrated(5)
nodes = np.flatnonzero(tree.parent >= 0)
print(acceptance.probability(tree.source[nodes], tree.depth[nodes], tree.score[nodes]).round(9).tolist())
for size in (1, 5, 90, 300):
    frontier, ends = -np.sort(-rng.uniform(0, 1.2, size)), expansion_sizes(size)
    forecast, known = acceptance.forecast(9, 2), rng.uniform(0, 1, 7)
    children, added = forecast.child_shares[0], forecast.added_tokens[0]
    chains, moved = rng.uniform(0, 1, 5), rng.uniform(0, 1, 5) < 0.5
    values, seconds = (known, chains, moved), 0.05 * np.arange(900.0)
    for one_pass in (False, True):
        count, net = best_expansion(frontier, ends, 0.3 + 0.1 * ends, 0.1, children, added, *values, seconds, one_pass)
        print(int(count), round(float(net), 9))
text = rng.integers(0, 4, (5, 40)).astype(np.int32)
print([found.tolist() for found in _latest_match(text, np.array([40, 1, 2, 30, 17]), 8)])
table = np.zeros((4, 8), np.uint64)
print([_learn(table, row, 0, 40, 0) for row in text], table.tolist())
proposed, log_p = np.full(9, -1), np.zeros(9)
_chain(table, text[0, 30:34].astype(np.int64), 2, proposed, log_p)
print(proposed.tolist(), log_p.round(9).tolist())
logits, top_k, top_p = rng.normal(0, 3, (4, 700)).astype(np.float32), np.array([0, 0, 9, 700]), np.full(4, 0.99)
print(sample(logits, np.ones(4), top_k, top_p, np.array([0, 7, 2**62, 3]), np.arange(4)).tolist())
"""


#: Two of the loops.
FEW = """
import numpy as np
from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask
tree = SuperTree.from_roots(np.arange(3))
tree.add(np.array([0, 0, 2]), np.arange(3), np.zeros(3))
print(ancestor_mask(tree)[0].tolist(), ragged_arange(np.array([1, 0, 1, 1])).tolist())
"""


def answers(program: str, **environment: str) -> tuple[str, str]:
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_without_numba_answers_are_the_same_and_one_warning_names_the_remedy():
    compiled, err = answers(ANSWERS.format(missing=False))
    assert err == ""
    assert len(compiled.splitlines()) == 14
    out, err = answers(ANSWERS.format(missing=True))
    assert out == compiled
    assert "install numba" in err
    assert err.count("UserWarning") == 1


def test_where_no_folder_can_be_written_they_are_compiled_each_time():
    compiled, err = answers(FEW)
    assert err == ""
    assert answers(FEW, NUMBA_CACHE_LOCATOR_CLASSES="_ZipCacheLocator") == (compiled, "")  # which finds no place
