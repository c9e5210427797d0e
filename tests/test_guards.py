"""Each guard of `test_architecture.py` against a planted violation: it sees what it guards against, and nothing else."""

from __future__ import annotations

from pathlib import Path

from testkit import error_codes, house, known_failures


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_the_count_sees_a_tenth_module(tmp_path: Path) -> None:
    nine = {f"sft_plugins/room/{name}.py": "" for name in (*"abcdefgh", "__main__")}
    plant(tmp_path, {**nine, "sft_plugins/room/__init__.py": "", "sft_plugins/room/inner/j.py": ""})
    assert house.crowded_folders(tmp_path) == {}
    assert house.crowded_folders(plant(tmp_path, {"sft_plugins/room/j.py": ""})) == {"sft_plugins/room": 10}


def test_the_check_of_faces_sees_every_way_to_reach_behind_one(tmp_path: Path) -> None:
    plant(tmp_path, dict.fromkeys(("sft_plugins/errors.py", "sft_plugins/a/__init__.py", "sft_plugins/a/z.py"), ""))
    fine = "from sft_plugins.errors import E\nfrom sft_plugins.a import Name\nfrom ..b import Other\nimport sft_plugins.a\n"
    plant(tmp_path, {"sft_plugins/b/__init__.py": "", "sft_plugins/b/x.py": fine})
    plant(tmp_path, {"sft_plugins/a/y.py": "import sft_plugins.a.z"})
    assert house.inner_imports(tmp_path) == set()
    for guilty in (
        "import sft_plugins.a.z",
        "from sft_plugins.a import z",
        "from sft_plugins.a.z import name",
        "def f():\n    from ..a.z import name",
    ):
        plant(tmp_path, {"sft_plugins/b/x.py": guilty})
        assert house.inner_imports(tmp_path) == {("b", "sft_plugins.a.z")}, guilty
    plant(tmp_path, {"sft_plugins/b/x.py": "", "integrations/host/h.py": "from sft_plugins.a.z import name"})
    assert house.inner_imports(tmp_path) == {("integrations", "sft_plugins.a.z")}


def test_the_check_of_circles_sees_one_that_types_alone_close(tmp_path: Path) -> None:
    plant(tmp_path, {"sft_plugins/a.py": "import sft_plugins.b", "sft_plugins/b.py": "from sft_plugins.c import x"})
    plant(
        tmp_path, {"sft_plugins/__init__.py": "from sft_plugins.a import x", "sft_plugins/c.py": "import sft_plugins"}
    )
    assert house.import_circles(tmp_path) == []
    plant(tmp_path, {"sft_plugins/c.py": "if TYPE_CHECKING:\n    from sft_plugins.a import y"})
    assert house.import_circles(tmp_path) == [["sft_plugins.a", "sft_plugins.b", "sft_plugins.c"]]


def test_the_search_sees_numbers_in_prose_docstrings_and_tables(tmp_path: Path) -> None:
    plant(tmp_path, {"sft_plugins/a.py": '"""Put back (C2); see M34–M36."""\nFAILURES = {"x": "P15"}\n'})
    plant(tmp_path, {"docs/b.md": "arXiv 2604.16027, an A100, M4000, v.M7.2, ruff's C419, page M3/M4, 50 P%; `P1`"})
    assert set(known_failures.cited(tmp_path)) == {"C2", "M34", "M35", "M36", "P15", "P1"}


def test_the_reading_of_codes_sees_each_way_to_write_one(tmp_path: Path) -> None:
    plant(tmp_path, {"sft_plugins/f.py": "class Finding:\n    level: str\n    code: str\ndef told(what, code): ...\n"})
    lines = [
        "from sft_plugins.f import Finding, told",
        'def f(self, *, code: str = "a_default"): raise Error("x", code="a" if f else "b")',
        'Finding("warn", "in_a_class", 1)',
        'told("what", "by_place")',
        'report.told("x", "in_a_method")',
        'other("x", "no_code")',
        'REMEDIES = {"in_a_table": "x"}',
        "raise Error(code=error.code)",
        'raise Error(code=record["code"])',
        "raise Error(code=code)",
    ]
    plant(tmp_path, {"sft_plugins/a.py": "\n".join(lines)})
    names = {"a_default", "a", "b", "in_a_class", "by_place", "in_a_method", "in_a_table"}
    assert set(error_codes.codes(tmp_path)) == names
    assert error_codes.unreadable(tmp_path) == []
    plant(tmp_path, {"sft_plugins/b.py": 'raise Error("x", code=f"bad_{name}")\n'})
    assert error_codes.unreadable(tmp_path) == ["sft_plugins/b.py:1: f'bad_{name}'"]
