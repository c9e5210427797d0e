"""`python -m sft_plugins`: the command line, where the script `sft-plugins` is not on PATH."""

from sft_plugins.cli import app

if __name__ == "__main__":
    app(prog_name="sft-plugins")
