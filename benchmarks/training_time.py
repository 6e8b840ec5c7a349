"""How long runs have trained: ``python -m benchmarks.training_time RECORD RUN [RUN ...]``.

Read from the runs' own metrics and checkpoints: seconds of training, evaluations left out, until the best checkpoint and until the last
record.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.training.checkpoint import load_checkpoint

SCHEMA = "worldmpc.training_time/1"


def read(run: Path) -> dict[str, Any]:
    """Return a row about a run; a record is looked for at or just before the best checkpoint's step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    meta = load_checkpoint(run / "checkpoints" / "best", groups=[])[1]
    best = [record for record in records if record["decisions"] <= meta["decisions"]][-1]
    row: dict[str, Any] = {"run": str(run), "agent": meta["config"]["agent"], "seed": meta["config"]["seed"]}
    for name, record in (("best", best), ("last", records[-1])):
        row |= {f"{name}_{key}": record[key] for key in ("env_steps", "decisions", "updates")}
        row[f"{name}_minutes"] = record["time/seconds"] / 60
    return row


def main() -> None:
    """Read and write."""
    rows = [read(Path(word)) for word in sys.argv[2:]]
    data = {"schema": SCHEMA, "command": command_line(), "commit": git_commit(), "machine": machine_info(), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(data, indent=2) + "\n")
    for row in rows:
        print(", ".join(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
