"""The array operations on a super-tree against plain walks from node to node."""

import numpy as np
from forests import nodes_of, path_to, super_trees
from hypothesis import given
from hypothesis import strategies as st

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


def test_an_empty_batch():
    tree = SuperTree.from_roots(np.zeros(0, np.int64))
    mask, begins = ancestor_mask(tree)
    assert (len(tree), len(mask), begins.tolist(), tree.sizes.tolist()) == (0, 0, [0], [])


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


@given(super_trees())
def test_add_keeps_the_columns_in_step(tree):
    for node in range(len(tree)):
        path = path_to(tree, node)
        assert tree.depth[node] == len(path) - 1
        assert tree.request[node] == path[0]  # request i's root is node i
    assert {len(column) for column in (tree.token, tree.parent, tree.request, tree.depth, tree.score)} == {len(tree)}


def some_nodes(tree: SuperTree) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tree) - 1), unique=True)
