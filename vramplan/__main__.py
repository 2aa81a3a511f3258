"""`python -m vramplan` is the command `vramplan`."""

from __future__ import annotations

from vramplan.cli.main import run

if __name__ == "__main__":
    run()
