"""Check that update and plan compiled by inductor equal the eager ones and do not compile again. Minutes on two cores.

Run from the repository's root: ``python -m benchmarks.compiled results.json``.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from tests import golden_data
from worldmpc.models import kernels
from worldmpc.report.provenance import command_line, git_commit, machine_info


def main() -> None:
    """Check both recorded sets, with the products of small and of large networks, and write how long each took."""
    rows = []
    for name, onednn_from in itertools.product(golden_data.SETS, (kernels.ONEDNN_FROM, 0)):
        kernels.ONEDNN_FROM = onednn_from
        begin = time.perf_counter()
        golden_data.check_compiled(name)
        seconds = round(time.perf_counter() - begin, 1)
        rows.append({"set": name, "onednn_from": onednn_from, "equal": True, "recompiled": False, "seconds": seconds})
        print(rows[-1], flush=True)
    record = {"command": command_line(), "commit": git_commit(), "machine": machine_info(), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
