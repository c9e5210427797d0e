"""`docs/known-failures.md` says which tests hold a failure, and each number there has one."""

from __future__ import annotations

from pathlib import Path

from testkit import known_failures

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / known_failures.PAGE).read_text(encoding="utf-8")
# Numbers without a test yet. One that has a test fails here: the list only grows shorter.
NOT_HELD: set[str] = set()


def test_the_page_names_the_tests_that_cite_its_numbers() -> None:
    assert known_failures.written(PAGE, known_failures.held(ROOT)) == PAGE, (
        "run `python tests/support/testkit/known_failures.py --write`"
    )


def test_every_known_failure_is_held_by_a_test() -> None:
    tests = known_failures.held(ROOT)
    listed = known_failures.rows(PAGE)
    assert len(listed) >= 84
    without = {number for number in listed if not any(tests.get(number, {}).values())}
    assert sorted(without - NOT_HELD) == [], "no docstring of a test cites these"
    assert sorted(NOT_HELD - without) == [], "these have tests now: take them out of NOT_HELD, and write the page"


def test_the_page_follows_its_tests(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "packing"
    folder.mkdir(parents=True)
    (folder / "test_a.py").write_text('def test_one():\n    """M1, and P2–P3."""\n\n\ndef test_two():\n    """P3."""\n')
    (folder / "test_b.py").write_text('FAULTS = [Fault(failure="M1")]\n')
    page = "| M1 | a | b | c | |\n| P2 | a | b | c | [old](x) |\n| P3 | a | b | c | |\n| C1 | a | b | c | old |\n"
    once = known_failures.written(page, known_failures.held(tmp_path))
    assert once == (
        "| M1 | a | b | c | [packing/test_a](../tests/packing/test_a.py) `test_one`<br>"
        "[packing/test_b](../tests/packing/test_b.py) |\n"
        "| P2 | a | b | c | [packing/test_a](../tests/packing/test_a.py) `test_one` |\n"
        "| P3 | a | b | c | [packing/test_a](../tests/packing/test_a.py) `test_one` `test_two` |\n"
        "| C1 | a | b | c | |\n"
    )
    assert known_failures.written(once, known_failures.held(tmp_path)) == once
