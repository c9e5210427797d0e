"""Which versions of the hosts are supported, checked once and said plainly."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from sft_plugins.errors import SFTPluginsError

# The oldest release that the tests run on. Newer ones are expected to work; the newest at the time of a release is tested.
SUPPORTED = {
    "torch": "2.10",
    "transformers": "5.16",
    "trl": "1.9",
    "peft": "0.20",
    "axolotl": "0.19",
    "ms-swift": "4.6",
}


def require(*packages: str) -> None:
    """Raise unless every one of `packages` is installed in a supported version.

    Raises:
        SFTPluginsError: `unsupported_version`. Not an ImportError: hosts swallow those and train without the plug-in.
    """
    for package in packages:
        oldest = SUPPORTED[package]
        try:
            found = version(package)
        except PackageNotFoundError:
            found = None
        if found is None or Version(found) < Version(oldest):
            raise SFTPluginsError(
                f"{package} >= {oldest} is needed, found {found or 'none'}.",
                code="unsupported_version",
                remedy=f"pip install '{package}>={oldest}'",
            )
