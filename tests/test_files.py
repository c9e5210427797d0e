"""Files and folders appear whole or not at all: after success, after an exception, over what was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_plugins._files import whole_or_not_at_all


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "rows.arrow"
    target.write_text("old")
    with whole_or_not_at_all(target) as draft:
        draft.write_text("new")
        assert target.read_text() == "old", "a reader has the old one until the new one is whole"
        assert draft.parent == target.parent, "another file system could not replace it in one step"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["rows.arrow"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "rows"
    if not folder:
        target.write_text("old")

    def write() -> None:
        with whole_or_not_at_all(target) as draft:
            if folder:
                draft.mkdir()
                (draft / "part").write_text("half")
            else:
                draft.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert names(tmp_path) == ([] if folder else ["rows"])
    assert folder or target.read_text() == "old"


def test_two_drafts_of_one_target_are_two_files(tmp_path: Path) -> None:
    with whole_or_not_at_all(tmp_path / "a") as first, whole_or_not_at_all(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1", "the last to be whole"
    assert names(tmp_path) == ["a"]
