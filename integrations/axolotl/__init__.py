"""The Axolotl plug-in."""
