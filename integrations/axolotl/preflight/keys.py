"""The keys that Axolotl knows: asked of it where it is installed, else those of one version, kept in `keys.txt`.

`python -m sft_plugins.integrations.axolotl.preflight.keys FILE` writes that file where Axolotl is installed.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from sft_plugins.errors import AssetError
from sft_plugins.integrations.axolotl.settings import KEY, PLUGIN
from sft_plugins.integrations.config_file import KnownKeys

_FILE = "keys.txt"


def known_keys(data: Mapping[str, Any]) -> KnownKeys:
    """Every key that may stand at the top of `data`, those of its plug-ins too where they are known.

    Raises:
        AssetError: `bad_config` for a plug-in that cannot be loaded where Axolotl is installed.
    """
    plugins = [str(plugin).replace(":", ".") for plugin in data.get("plugins") or ()]
    try:
        names = _of_axolotl()
    except ImportError:
        return _kept(plugins)
    return KnownKeys(names.union({KEY}, *map(_of_plugin, plugins)), f"Axolotl {version('axolotl')}", complete=True)


def _kept(plugins: list[str]) -> KnownKeys:
    """Lines of `keys.txt`: a comment with the version, then a key each, then a plug-in each with its keys."""
    first, *lines = files(__package__).joinpath(_FILE).read_text(encoding="utf-8").splitlines()
    of_plugin = {name: keys for name, *keys in map(str.split, lines) if "." in name} | {PLUGIN: [KEY]}
    names = {KEY, *(line for line in lines if "." not in line)}
    unknown = tuple(plugin for plugin in plugins if plugin not in of_plugin)
    found = names.union(*(of_plugin.get(plugin, ()) for plugin in plugins))
    return KnownKeys(found, first.removeprefix("# "), complete=False, extended_by=unknown)


def _of_axolotl() -> set[str]:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    names = set()
    for name, field in AxolotlInputConfig.model_fields.items():
        names |= {name, *(str(alias) for alias in (field.alias, field.validation_alias) if alias)}
    return names


def _of_plugin(plugin: str) -> set[str]:
    """Keys that a plug-in adds."""
    module, _, cls = plugin.rpartition(".")
    try:
        arguments = getattr(import_module(module), cls)().get_input_args()
    except (ImportError, AttributeError, ValueError) as error:
        raise AssetError(
            f"`plugins: {plugin}` cannot be loaded: {error}.", code="bad_config", remedy="Correct or install it."
        ) from error
    if not arguments:
        return set()
    module, _, cls = arguments.rpartition(".")
    return set(getattr(import_module(module), cls).model_fields)


def _axolotls_plugins() -> Iterator[str]:
    """The plug-ins that come with Axolotl, as a YAML names them."""
    import axolotl.integrations
    from axolotl.integrations.base import BasePlugin

    for found in pkgutil.iter_modules(axolotl.integrations.__path__):
        try:
            module = import_module(f"axolotl.integrations.{found.name}")
        except ImportError:  # needs what is not installed
            continue
        for name, value in vars(module).items():
            if (
                isinstance(value, type)
                and issubclass(value, BasePlugin)
                and value.__module__.startswith(module.__name__)
            ):
                yield f"{module.__name__}.{name}"


if __name__ == "__main__":
    plugins = [f"{name} {' '.join(sorted(_of_plugin(name)))}".rstrip() for name in sorted(set(_axolotls_plugins()))]
    lines = [f"# Axolotl {version('axolotl')}", *sorted(_of_axolotl()), *plugins]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
