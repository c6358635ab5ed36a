"""The array operations on a super-tree against plain walks from node to node."""

import numpy as np
from forests import nodes_of, path_to, super_trees
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.speculation.pack import BLOCK, pack
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask


def assert_mask_is_the_walks(tree: SuperTree) -> None:
    mask, begins = ancestor_mask(tree)
    assert mask.dtype == np.uint8
    assert begins[-1] == len(mask)
    assert len(begins) == tree.num_requests + 1
    for request in range(tree.num_requests):
        nodes = nodes_of(tree, request)
        want = [[column in path_to(tree, row) for column in nodes] for row in nodes]
        section = mask[begins[request] : begins[request + 1]].reshape(len(nodes), len(nodes))
        np.testing.assert_array_equal(section, np.array(want, np.uint8).reshape(section.shape))


@given(super_trees())
def test_mask_of_whole_trees(tree):
    assert_mask_is_the_walks(tree.sorted_by_request(np.arange(len(tree)))[0])


@given(super_trees(), st.data())
def test_mask_of_a_part_stops_where_a_parent_is_left_out(tree, data):
    part, _ = tree.sorted_by_request(np.array(data.draw(some_nodes(tree)), np.int64))
    assert_mask_is_the_walks(part)


@given(super_trees(), st.data())
def test_sorted_by_request(tree, data):
    chosen = data.draw(some_nodes(tree))
    part, index = tree.sorted_by_request(np.array(chosen, np.int64))
    assert sorted(index.tolist()) == sorted(chosen)
    assert part.num_requests == tree.num_requests
    assert part.request.tolist() == sorted(part.request.tolist())
    assert part.sizes.tolist() == [sum(tree.request[n] == r for n in chosen) for r in range(tree.num_requests)]
    old = index.tolist()
    for new, node in enumerate(old):
        for column in ("token", "request", "depth", "score"):
            assert getattr(part, column)[new] == getattr(tree, column)[node]
        parent = int(tree.parent[node])
        assert part.parent[new] == (old.index(parent) if parent in chosen else -1)
        assert part.parent[new] < new


@given(super_trees(), st.data())
def test_ancestors_and_self(tree, data):
    chosen = data.draw(some_nodes(tree))
    want = {above for node in chosen for above in path_to(tree, node)}
    assert set(np.flatnonzero(tree.ancestors_and_self(np.array(chosen, np.int64))).tolist()) == want


@given(super_trees(), st.data())
def test_best_paths(tree, data):
    chance = np.array(data.draw(st.lists(st.integers(0, 8), min_size=len(tree), max_size=len(tree)))) / 8
    requests = np.array(data.draw(st.lists(st.booleans(), min_size=tree.num_requests, max_size=tree.num_requests)))
    kept = np.flatnonzero(tree.best_paths(chance, requests)).tolist()
    for request, alone in enumerate(requests):
        nodes = nodes_of(tree, request)
        of_request = [node for node in kept if node in nodes]
        if not alone:
            assert of_request == nodes
            continue
        assert sorted(path_to(tree, of_request[-1])) == of_request
        best = max(chance[path_to(tree, node)].sum() for node in nodes)
        assert chance[of_request].sum() == best


def some_nodes(tree: SuperTree) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tree) - 1), unique=True)


# -- calls -----------------------------------------------------------------------------------------------------------


INT32 = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask_begins")


def shuffled_table(requests: int, blocks: int) -> np.ndarray:
    return np.random.default_rng(5).permutation(requests * blocks).reshape(requests, blocks)


@given(super_trees(max_requests=3), st.data())
def test_trees_and_prompt_chunks(tree, data):
    tree, _ = tree.sorted_by_request(np.arange(len(tree)))
    masked = data.draw(st.booleans(), label="with a mask")
    chunks = data.draw(st.lists(st.integers(1, 3 * BLOCK), max_size=3), label="chunks")
    counts = [*tree.sizes.tolist(), *chunks]
    past = data.draw(st.lists(st.integers(0, 3 * BLOCK), min_size=len(counts), max_size=len(counts)), label="past")
    table = shuffled_table(len(counts), 8)

    inputs, begins, blocks, block_begins = [], [0], [], [0]
    for request, (count, seen) in enumerate(zip(counts, past, strict=True)):
        if request < tree.num_requests:
            of_request = tree.request == request
            inputs += zip(tree.token[of_request], seen + tree.depth[of_request], strict=True)
        else:
            inputs += ((100 + index, seen + index) for index in range(count))
        begins.append(begins[-1] + count)
        blocks += [table[request, block] for block in range(table.shape[1]) if block * BLOCK < seen + count]
        block_begins.append(len(blocks))
    mask, mask_begins = ancestor_mask(tree) if masked else (np.zeros(0, np.uint8), np.zeros(1, np.int64))
    tokens, positions = np.array(inputs).T

    call = pack(
        tokens,
        positions,
        np.array(past),
        np.array(counts),
        table,
        np.array([0, len(tokens) - 1]),
        (mask, mask_begins) if masked else None,
    )

    assert list(zip(call.token_ids, call.positions, strict=True)) == inputs
    assert call.past_lens.tolist() == past
    assert call.seq_begins.tolist() == begins
    assert call.block_indices.tolist() == blocks
    assert call.block_begins.tolist() == block_begins
    assert call.tree_mask.tolist() == mask.tolist()
    causal = [len(mask)] * (len(counts) + 1 - len(mask_begins))  # empty sections
    assert call.tree_mask_begins.tolist() == [*mask_begins.tolist(), *causal]
    assert call.logit_rows.tolist() == [0, len(tokens) - 1]


def test_types_are_the_operators():
    call = pack(np.arange(3), np.arange(3), np.array([BLOCK]), np.array([3]), shuffled_table(1, 2), np.array([2]))
    arrays = {name: value for name, value in call._asdict().items() if name != "padded_to"}
    assert call.padded_to == 0
    assert {name for name, value in arrays.items() if value.dtype == np.int32} == set(INT32)
    assert call.tree_mask.dtype == np.uint8
    assert {call.token_ids.dtype, call.positions.dtype, call.logit_rows.dtype} == {np.dtype(np.int64)}
    assert all(value.flags.c_contiguous for value in arrays.values())


def test_an_empty_call():
    none = np.zeros(0, np.int64)
    call = pack(none, none, none, none, np.zeros((0, 4), np.int64), none)
    assert call.seq_begins.tolist() == call.block_begins.tolist() == call.tree_mask_begins.tolist() == [0]
