"""`count_origins` of many rows at once: the count by hand of each row by itself, whatever stood in the row before."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_plugins.masking.encoding.origins import Origin, count_origins
from sft_plugins.masking.encoding.pieces import Pieces
from testkit.properties import quiet

# Ids stand for one, two or no bytes; texts are of so few letters that contents stand where they are not looked for.
SPELLED = ["a", "b", "ab", "\n", "é", "", "ba"]
ROLES = ["user", "assistant", "tool"]


def pieces() -> Pieces:
    spelled = [text.encode() for text in SPELLED]
    return Pieces(b"".join(spelled), list(map(len, spelled)))


def naive(contents: list[tuple[str, bytes]], ids: list[int], trained: list[bool]) -> dict[str, int]:
    """Byte by byte: the role that each byte belongs to, then each token by its bytes."""
    spelled = "".join(SPELLED[token] for token in ids).encode()
    owner: list[Any] = [None] * len(spelled)
    position = 0
    for number, (role, content) in enumerate(contents):
        if content and (found := spelled.find(content, position)) >= 0:
            position = found + len(content)
            owner[found:position] = [(number, role)] * len(content)
    counts: Counter[str] = Counter()
    spans: dict[Any, list[int]] = {}
    at = 0
    for index, token in enumerate(ids):
        width = len(SPELLED[token].encode())
        for whose in {*owner[at : at + width]} - {None}:
            spans.setdefault(whose, []).append(index)
        at += width
    for (_, role), tokens in spans.items():
        if role != "assistant" or not trained[tokens[0]]:
            counts[role] += tokens[-1] + 1 - tokens[0]
    own = sum(trained)
    return {"trained": own, **counts, "template": len(ids) - own - sum(counts.values())}


contents_of = st.lists(
    st.tuples(st.sampled_from(ROLES), st.sampled_from(["", "a", "b", "ab", "aba", "é", "bb"]).map(str.encode)),
    min_size=1,
    max_size=4,
)
ids_of = st.lists(st.integers(0, len(SPELLED) - 1), min_size=1, max_size=14)


@st.composite
def grown(draw: st.DrawFn) -> list[tuple[list[tuple[str, bytes]], list[int]]]:
    """Rows as splits make them: each goes on from some of the one before, maybe with one content changed, or is another."""
    rows = [(draw(contents_of), draw(ids_of))]
    for _ in range(draw(st.integers(0, 4))):
        contents, ids = rows[-1]
        if draw(st.booleans()):
            kept = draw(st.integers(0, len(ids)))
            contents = [*contents, *draw(contents_of)]
            if draw(st.booleans()):
                contents[draw(st.integers(0, len(contents) - 1))] = draw(contents_of)[0]
            rows.append((contents, [*ids[:kept], *draw(ids_of)]))
        else:
            rows.append((draw(contents_of), draw(ids_of)))
    return rows


@quiet(max_examples=400)
@given(grown(), st.booleans(), st.randoms(use_true_random=False))
def test_rows_after_one_another_are_counted_as_each_by_itself(rows: Any, known: bool, random: Any) -> None:
    trained = [[random.random() < 0.3 for _ in ids] for _, ids in rows]
    ends = np.cumsum([len(ids) for _, ids in rows]).tolist()
    texts = ["".join(SPELLED[token] for token in ids) + "ab" for _, ids in rows]
    made = count_origins(
        [Origin(contents, text if known else None) for (contents, _), text in zip(rows, texts, strict=True)],
        np.concatenate([ids for _, ids in rows]).astype(np.int32),
        np.concatenate(trained),
        [0, *ends],
        pieces(),
    )
    expected = [naive(contents, ids, own) for (contents, ids), own in zip(rows, trained, strict=True)]
    assert made == expected


def test_a_content_that_the_row_before_had_in_another_place_is_looked_for_anew() -> None:
    """The first is not in the first row's bytes at all, so nothing of that row says where it stands in the second's."""
    contents = [("user", b"bb"), ("tool", b"a")]
    rows = [(contents, [0, 0, 1]), ([*contents, ("assistant", b"a")], [1, 1, 0, 0])]
    made = count_origins(
        [Origin(contents, None) for contents, _ in rows],
        np.array([0, 0, 1, 1, 1, 0, 0]),
        np.zeros(7, bool),
        [0, 3, 7],
        pieces(),
    )
    assert made == [
        {"trained": 0, "tool": 1, "template": 2},
        {"trained": 0, "assistant": 1, "user": 2, "tool": 1, "template": 0},
    ]


def test_a_row_of_the_same_bytes_whose_contents_are_another_speakers_is_counted_for_that_one() -> None:
    first, last = ("user", b"a"), ("assistant", b"ba")
    rows = [[first, (role, b"b"), last] for role in ("tool", "user", "tool")]
    made = count_origins(
        [Origin(contents, None) for contents in rows],
        np.array([0, 1, 6] * 3),
        np.array([0, 0, 1] * 3, bool),
        [0, 3, 6, 9],
        pieces(),
    )
    tool, user = {"user": 1, "tool": 1}, {"user": 2}
    assert made == [{"trained": 1, **whose, "template": 0} for whose in (tool, user, tool)]


def test_no_rows_and_ids_without_bytes() -> None:
    assert count_origins([], np.empty(0, np.int32), np.empty(0, bool), [0], pieces()) == []
    two = [Origin([("user", b"a")], None)] * 2
    made = count_origins(two, np.zeros(5, np.int32), np.array([0, 1, 1, 0, 0], bool), [0, 3, 5], None)
    assert made == [{"trained": 2, "untrained": 1}, {"trained": 0, "untrained": 2}]
