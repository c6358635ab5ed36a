"""Recorded trees: what was drafted comes back, and a replay goes as the real run does."""

from __future__ import annotations

import io
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recordings import answer_of, paths_at, recording
from refusal import refused

from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.super_tree import SuperTree
from echo_trt_lab.calibration.trees import RecordedDraft, Trees

SHAPE, INT32 = EchoSettings(max_depth=3, beams=3, width=3, per_request=64), 24


def chats(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_are_those_of_plain_decoding_and_each_token_but_the_first_has_a_tree(recorded, texts, open_llm):
    plain = open_llm("close", "autoregressive", 2).chat(chats(texts), SamplingParams(INT32))
    assert [answer_of(recorded, r) for r in range(len(texts))] == [c.token_ids for c in plain]
    indices = sorted(zip(recorded.request.tolist(), recorded.index.tolist(), strict=True))
    assert indices == [(r, i) for r, c in enumerate(plain) for i in range(1, len(c.token_ids))]
    assert recorded.groups[recorded.group].tolist() == ["odd", "even", "odd", "even", "odd"]
    assert (recorded.left >= 1).all()


def test_recorded_trees_are_whole(recorded):
    for position in range(len(recorded)):
        children = paths_at(recorded, position)
        levels = [sum(len(path) == depth for path in children) for depth in range(1, 5)]
        max_draft_len = INT32 - recorded.index[position] - 1
        assert levels == [
            3 if max_draft_len >= 1 else 0,
            9 if max_draft_len >= 2 else 0,
            9 if max_draft_len >= 3 else 0,
            0,
        ]
        for each in children.values():
            assert each == sorted(each, reverse=True)
            assert len({token for _, token in each}) == len(each)
            assert all(log_q <= 0 for log_q, _ in each)


@given(st.data())
def test_a_recorded_draft_says_what_was_recorded_whatever_is_asked(recorded, data):
    """Any nodes, of trees that hold strangers too: of those and of what was not expanded nothing is known."""
    count, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    positions = np.array(data.draw(st.lists(st.integers(0, len(recorded) - 1), min_size=count, max_size=count)))
    draft, tree = RecordedDraft(recorded, positions, width), SuperTree.from_roots(np.zeros(count))
    paths: list[tuple[int, ...]] = [()] * count
    requests = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True).map(sorted))
    nodes = np.array(requests)
    for depth in range(4):
        log_q, tokens = draft.expand_roots(nodes) if depth == 0 else draft.expand(tree, nodes)
        assert log_q.shape == tokens.shape
        assert len(tokens) == len(nodes)
        assert tokens.shape[1] <= width
        below = []
        for node, own_q, own_tokens in zip(nodes.tolist(), log_q, tokens, strict=True):
            known = paths_at(recorded, positions[tree.request[node]]).get(paths[node], [])[:width]
            exists = own_q > -np.inf
            assert list(zip(own_q[exists].tolist(), own_tokens[exists].tolist(), strict=True)) == known
            stranger = [data.draw(st.integers(300, 302))]
            for token in [*own_tokens[exists].tolist(), *stranger]:
                below.append((node, token, (*paths[node], token)))
        below = [each for each in below if data.draw(st.booleans())]
        if not below:
            return
        parents, added, new_paths = zip(*below, strict=True)
        nodes = tree.add(np.array(parents), np.array(added), np.zeros(len(added)))
        paths += new_paths


def test_truth_is_the_answers_own_text_and_ends_with_it():
    trees = recording([[5, 6, 7], [8], [9, 10]], [(0, 1), (0, 2), (2, 1), (2, 2)])
    assert trees.left.tolist() == [2, 1, 1, 0]
    ahead = [[6, 7, -1], [7, -1, -1], [10, -1, -1], [-1, -1, -1]]
    for index in range(3):
        requested = np.full(4, index + 1)
        assert trees.truth(np.arange(4), requested).tolist() == [row[index] for row in ahead]
    assert trees.truth(np.array([2, 0]), np.array([1, 2])).tolist() == [10, 7]


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(recorded, tmp_path):
    file = tmp_path / "trees.npz"
    file.write_bytes(recorded.to_bytes())
    again = Trees.read(file)
    for name in Trees.__dataclass_fields__:
        before, after = getattr(recorded, name), getattr(again, name)
        assert before.dtype == after.dtype
        assert (before == after).all()


def archive(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def one_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.arange(5))
    return stream.getvalue()


def changed(content: bytes, index: int, value: int) -> bytes:
    """``index``: in the first entry of the zip's directory."""
    index += content.index(b"PK\x01\x02")
    return content[:index] + bytes([value]) + content[index + 1 :]


WHOLE = archive(answers=np.arange(5000), token=np.random.default_rng(0).integers(0, 9, 5000))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 no more",
        WHOLE[: len(WHOLE) // 2],
        one_array(),
        changed(WHOLE, 8, 1),
    ],
    ids=["empty", "zip-like", "cut", "one-array", "encrypted"],
)
def test_a_file_that_is_no_recording_is_named(content, tmp_path):
    file = tmp_path / "trees.npz"
    file.write_bytes(content)
    with refused(file, "bench --record"):
        Trees.read(file)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("token", lambda a: a[:-1]),
        ("node_begins", lambda a: a + 1),
        ("answers", lambda a: a.astype(float)),
        ("request", lambda a: a + 1),
        ("index", lambda a: a + INT32),
        ("parent", lambda a: a - 1),
        ("matched", lambda a: a - 1000),
        ("log_q", lambda a: np.where(a < -1, np.nan, a)),
        ("groups", lambda a: a[0]),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_no_recording(name, change, recorded, tmp_path):
    file = tmp_path / "trees.npz"
    before = getattr(recorded, name)
    file.write_bytes(archive(**asdict(replace(recorded, **{name: change(before)}))))
    with refused(file, "bench --record"):
        Trees.read(file)
