"""The core knows no trainer, every module keeps to its room, names and codes are frozen, and what is declared is there."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testkit import error_codes, house, known_failures

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "sft_plugins"
HOSTS = ("trl", "axolotl", "sft_plugins.integrations", "integrations")
LAZY = ("numba", "matplotlib", "sentence_transformers", "sacrebleu", "gguf")
# The demo trains with TRL, mask writes rows as hosts read them, preflight reads their configurations: imported when they run.
FACING_HOSTS = {CORE / "cli" / name for name in ("demo/training.py", "mask.py", "preflight.py")}


def core_modules() -> list[str]:
    paths = sorted(CORE.rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def loaded_after(statement: str, tmp_path: Path) -> set[str]:
    """The modules that a fresh interpreter, started outside the repository, has loaded after `statement`."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def forbidden(modules: set[str], names: tuple[str, ...]) -> list[str]:
    return sorted(m for m in modules if any(m == name or m.startswith(f"{name}.") for name in names))


def imports_of(path: Path, root: Path = ROOT) -> set[str]:
    """Every module and name that `path` imports, at its top or inside a function; relative imports resolved."""
    return {name for module, part in house.imports(path, root) for name in (module, f"{module}.{part}".rstrip("."))}


# --- the core imports no trainer --------------------------------------------------------------------------------------


def test_importing_every_core_module_loads_no_trainer(tmp_path: Path) -> None:
    modules = core_modules()
    assert len(modules) > 20  # against an empty list passing
    loaded = loaded_after("\n".join(f"import {name}" for name in modules), tmp_path)
    assert set(modules) <= loaded
    assert forbidden(loaded, HOSTS) == []


def test_importing_every_core_module_loads_no_heavy_optional_package(tmp_path: Path) -> None:
    loaded = loaded_after("\n".join(f"import {name}" for name in core_modules()), tmp_path)
    assert forbidden(loaded, LAZY) == []


def test_the_import_check_sees_a_trainer_when_there_is_one(tmp_path: Path) -> None:
    """The guard of the two tests above: with one import of an integration added, the same check reports it."""
    pytest.importorskip("trl", reason="TRL is not installed in this environment")
    loaded = loaded_after("import sft_plugins\nimport trl\nimport sft_plugins.integrations", tmp_path)
    assert {"trl", "sft_plugins.integrations"} <= set(forbidden(loaded, HOSTS))


def test_no_source_file_of_the_core_names_a_trainer_even_inside_a_function() -> None:
    files = [path for path in CORE.rglob("*.py") if path not in FACING_HOSTS]
    assert len(files) > 15
    guilty = {str(path.relative_to(ROOT)): forbidden(imports_of(path), HOSTS) for path in files}
    assert {path: names for path, names in guilty.items() if names} == {}


def test_the_static_check_sees_lazy_and_relative_imports(tmp_path: Path) -> None:
    path = tmp_path / "sft_plugins" / "masking" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    import trl.trainer\n    from ..integrations import trl as host\n    from axolotl import x\n"
    )
    assert forbidden(imports_of(path, tmp_path), HOSTS) == [
        "axolotl", "axolotl.x", "sft_plugins.integrations", "sft_plugins.integrations.trl", "trl.trainer",
    ]  # fmt: skip


def test_integrations_are_loaded_under_one_name_only() -> None:
    """With the repository root on `sys.path` each file of `integrations/` would load twice, with two sets of classes."""
    assert "integrations" not in sys.modules
    package = importlib.import_module("sft_plugins.integrations")
    assert Path(package.__file__ or "").resolve() == ROOT / "integrations" / "__init__.py"


# --- every module in its room -----------------------------------------------------------------------------------------


def test_no_folder_lists_more_than_nine_modules() -> None:
    assert house.crowded_folders(ROOT) == {}


def test_no_package_imports_what_stands_behind_the_face_of_another() -> None:
    assert house.inner_imports(ROOT) == set()


def test_modules_import_one_another_in_no_circle() -> None:
    assert house.import_circles(ROOT) == []


# --- numbers of failures and codes of errors --------------------------------------------------------------------------


def test_every_number_of_a_failure_has_its_row_on_the_page() -> None:
    page = known_failures.rows((ROOT / known_failures.PAGE).read_text(encoding="utf-8"))
    cited = known_failures.cited(ROOT)
    assert {"M7", "P15", "C2"} <= set(cited)  # against an empty search passing
    assert {number: files for number, files in cited.items() if number not in page} == {}


def listed_codes() -> list[str]:
    return re.findall(
        r"^\| `([a-z_]+)` \| [^|]+\. \|$", (ROOT / "docs" / "codes.md").read_text(encoding="utf-8"), flags=re.M
    )


def test_codes_of_errors_are_frozen() -> None:
    """A new code is a new line of `docs/codes.md`, with one sentence; a code that goes is a break of the contract."""
    listed, found = listed_codes(), error_codes.codes(ROOT)
    assert len(listed) == len(set(listed)) > 100
    assert {code: sorted(found[code]) for code in found.keys() - set(listed)} == {}, "not in docs/codes.md"
    assert set(listed) - found.keys() == set(), "in docs/codes.md, and nothing raises it"


def test_no_place_of_a_code_is_overlooked() -> None:
    assert error_codes.unreadable(ROOT) == []


# --- the public names -------------------------------------------------------------------------------------------------

MASKING = [
    "MaskReport", "Masked", "MaskedExample", "PromptMasker", "StrictPromptMaskingCollator", "check_masks", "mask_dataset",
]  # fmt: skip
PACKING = [
    "BalanceReport", "BlockDiagonalPackingCollator", "Dealt", "IsolationReport", "PackPlan", "PackReport", "PackStream",
    "Packed", "RowCost", "check_dealing", "check_isolation", "deal_rows", "even_rows", "isolate", "pack_dataset",
    "pack_stream", "plan_packs",
]  # fmt: skip
COLLAPSE = [
    "DetectorConfig", "Finding", "ModeCollapseCallback", "Softened", "Verdict", "load_prompts", "soften", "write_report",
]  # fmt: skip
TOP = [
    "BlockDiagonalPackingCollator", "ModeCollapseCallback", "PromptMasker", "StrictPromptMaskingCollator",
    "check_isolation", "check_masks", "isolate", "mask_dataset", "pack_dataset", "pack_stream", "plan_packs",
]  # fmt: skip
ERRORS = ["CollapseError", "ContaminationError", "MaskingError", "PackingError", "SFTPluginsError"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("sft_plugins", TOP + ERRORS),
        ("sft_plugins.masking", MASKING),
        ("sft_plugins.packing", PACKING),
        ("sft_plugins.collapse", COLLAPSE),
    ],
)
def test_public_names_are_frozen(module: str, names: list[str]) -> None:
    package = importlib.import_module(module)
    assert sorted(package.__all__) == sorted(names)
    assert all(hasattr(package, name) for name in names)


FACES = [
    "sft_plugins",
    *(f"sft_plugins.{name}" for name in ("masking", "packing", "collapse", "preflight", "integrations")),
]


@pytest.mark.parametrize("face", FACES)
def test_a_face_gives_what_it_declares_and_nothing_else(face: str) -> None:
    """What type checkers read (imports below `TYPE_CHECKING`) and what is imported on demand are one."""
    package = importlib.import_module(face)
    path = Path(package.__file__ or "")
    told = {(module, name) for module, name in house.imports(path, ROOT) if module.startswith(f"{face}.")}
    assert len(told) >= 5
    for module, name in sorted(told):
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert set(package.__all__) <= {name for _, name in told} <= {*dir(package)}
    with pytest.raises(AttributeError, match=f"module '{face}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("from sft_plugins.packing import plan_packs", ("datasets", "pyarrow", "torch", "transformers")),
        ("from sft_plugins.packing import pack_dataset, TokenColumn", ("torch", "transformers")),
        ("from sft_plugins.packing import pack_stream", ("transformers", "torch._dynamo")),
        ("from sft_plugins.masking import PromptMasker, mask_dataset, check_masks", ("torch",)),
        (
            "from sft_plugins.collapse import read_history, summarise, page_context",
            ("datasets", "torch", "transformers"),
        ),
    ],
)
def test_what_needs_no_model_loads_none_of_its_libraries(
    statement: str, without: tuple[str, ...], tmp_path: Path
) -> None:
    """Rows are masked and packed, and recorded runs read, by processes that wait for no import of torch: commands, workers."""
    loaded = loaded_after(statement, tmp_path)
    assert "sft_plugins" in loaded
    assert forbidden(loaded, without) == []


# --- packaging --------------------------------------------------------------------------------------------------------


def declared() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_in_the_tree() -> list[str]:
    core = [path.parent.relative_to(ROOT) for path in CORE.rglob("__init__.py")]
    hosts = [
        Path("sft_plugins") / path.parent.relative_to(ROOT) for path in (ROOT / "integrations").rglob("__init__.py")
    ]
    return sorted(".".join(path.parts) for path in core + hosts)


def test_declared_packages_are_the_packages_in_the_tree() -> None:
    assert sorted(declared()["tool"]["setuptools"]["packages"]) == packages_in_the_tree()
