"""An Axolotl YAML → `Plan`. With our plug-in in it, what the plug-in will do; without, what Axolotl does by itself."""

from sft_plugins.integrations.axolotl.preflight.reading import read as read
