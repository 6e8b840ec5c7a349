"""Check that update and plan compiled by inductor equal the eager ones and do not compile again. Minutes on two cores.

Run from the repository's root: ``python -m benchmarks.compiled results.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests import golden_data
from worldmpc.report.provenance import command_line, git_commit, machine_info


def main() -> None:
    """Check both recorded sets and write how long each took; compiled networks are PyTorch's, whatever evaluates the eager ones."""
    rows = []
    for name in golden_data.SETS:
        begin = time.perf_counter()
        golden_data.check_compiled(name)
        rows.append({"set": name, "equal": True, "recompiled": False, "seconds": round(time.perf_counter() - begin, 1)})
        print(rows[-1], flush=True)
    record = {"command": command_line(), "commit": git_commit(), "machine": machine_info(), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
