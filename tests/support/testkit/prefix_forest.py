"""Prefix trees told apart again, and folded the slow way: what the fold of `sft_plugins.packing.prefix_tree` is held to.

A row is `(input_ids, labels)`; a segment `(tokens, labels, parent, depth)` sees `depth` tokens of its parent's path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import strategies as st

Row = tuple[list[int], list[int]]
Segment = tuple[list[int], list[int], int, int]


def trained(rows: Iterable[Row]) -> Counter[tuple[int, ...]]:
    """Every trained token with all before it, as often as it is trained."""
    return Counter(tuple(ids[: q + 1]) for ids, labels in rows for q in range(len(ids)) if labels[q] != -100)


def segments_of(packed: Mapping[str, Any]) -> list[Segment]:
    """The segments of a packed row."""
    found, at = [], 0
    for end, depth, parent in zip(packed["seq_lengths"], packed["seq_depths"], packed["seq_parents"], strict=True):
        here = slice(at, at + end - depth)
        found.append((list(packed["input_ids"][here]), list(packed["labels"][here]), int(parent), int(depth)))
        at = here.stop
    assert at == len(packed["input_ids"]) == len(packed["labels"])
    return found


def paths_of(segments: list[Segment]) -> list[Row]:
    """Each segment as the row that ends with it, with the labels of its own tokens alone."""
    paths: list[Row] = []
    for number, (tokens, labels, parent, depth) in enumerate(segments):
        assert -1 <= parent < number
        assert (depth == 0) == (parent == -1)
        assert labels[0] == -100
        assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
        before = paths[parent][0][:depth] if parent >= 0 else []
        assert len(before) == depth
        if parent >= 0:
            assert paths[parent][0][depth] == tokens[0], "the fork's token is repeated"
        paths.append((before + tokens, [-100] * depth + labels))
    return paths


def fold_slowly(rows: list[Row]) -> list[Segment]:
    """Token by token into a tree of nodes, keyed on (token, next token), then laid out; the largest child goes on."""
    root: dict[str, Any] = {"children": []}
    for ids, labels in rows:
        node = root
        for p, token in enumerate(ids):
            key = (token, ids[p + 1] if p + 1 < len(ids) else None)
            trains = p + 1 < len(ids) and labels[p + 1] != -100
            fitting = [c for c in node["children"] if c["key"] == key and not (trains and c["trains"])]
            if not fitting:
                fitting = [{"key": key, "trains": False, "children": [], "depth": p}]
                node["children"] += fitting
            node = fitting[0]
            node["trains"] |= trains
    segments: list[Segment] = []

    def size(node: dict[str, Any]) -> int:
        return 1 + sum(map(size, node["children"]))

    def lay(node: dict[str, Any], parent: int) -> None:
        number, others = len(segments), []
        tokens, labels = [node["key"][0]], [-100]
        segments.append((tokens, labels, parent if node["depth"] else -1, node["depth"]))
        while node["children"]:
            on = max(node["children"], key=size)
            others += [child for child in node["children"] if child is not on]
            tokens.append(on["key"][0])
            labels.append(on["key"][0] if node["trains"] else -100)
            node = on
        for child in others:
            lay(child, number)

    for node in root["children"]:
        lay(node, -1)
    return segments


@st.composite
def forests(draw: st.DrawFn, *, words: int = 4, turns: int = 4) -> list[Row]:
    """Rows of conversations whose history is rewritten, rows that meet by chance, copies of rows, beginnings of rows."""
    rows: list[Row] = []
    word = st.integers(5, 4 + words)
    for _ in range(draw(st.integers(1, 3))):
        history = draw(st.lists(word, min_size=1, max_size=4))
        for _ in range(draw(st.integers(1, turns))):
            thought = draw(st.sampled_from([[], [91], [91, 92]]))
            answer = [*draw(st.lists(word, min_size=0, max_size=4)), 2]
            rows.append((history + thought + answer, [-100] * len(history) + thought + answer))
            history = history + answer + draw(st.lists(word, min_size=1, max_size=3))
    for _ in range(draw(st.integers(0, 3))):
        ids, labels = draw(st.sampled_from(rows))
        end = draw(st.integers(1, len(ids)))
        rows.append((ids[:end], labels[:end]))
    for _ in range(draw(st.integers(0, 3))):
        ids = draw(st.lists(word, min_size=1, max_size=6))
        rows.append((ids, [-100, *(token if draw(st.booleans()) else -100 for token in ids[1:])]))
    return draw(st.permutations(rows))
