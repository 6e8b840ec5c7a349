"""``python -m worldmpc``."""

from __future__ import annotations

import sys

from worldmpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
