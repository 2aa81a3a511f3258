"""`python -m vramplan` is the command `vramplan`."""

from __future__ import annotations

import sys

from vramplan.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
