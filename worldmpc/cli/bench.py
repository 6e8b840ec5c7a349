"""``worldmpc bench``: speed against what the machine's matrix products allow."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from worldmpc import bench as measuring
from worldmpc.cli.output import console_for, say, write_json
from worldmpc.cli.text import BENCH
from worldmpc.cli.words import override_values, split_words
from worldmpc.config import make_config
from worldmpc.report.provenance import machine_line


def bench(words: list[str]) -> int:
    """Measure, print a table, and return the exit status."""
    options, rest = split_words(words, BENCH)
    config = make_config(**override_values(rest))
    console = console_for(options["json"])
    sizes = {name: options[name] for name in ("obs_dim", "action_dim", "repeats", "seconds")}
    record = measuring.bench(config, **sizes)
    _print(record, console)
    write_json(options["json"], record)
    return 0


def _print(record: dict[str, Any], console: Console) -> None:
    config = record["config"]
    table = Table(title=f"model {config['model']['size']}, {record['obs_dim']} observations, {record['action_dim']} actions")
    table.add_column("")
    for name in ("median ms", "p10", "p90", "best", "limit ms", "limit / median", "limit / best", "GFLOP"):
        table.add_column(name, justify="right")
    for name in ("plan", "update"):
        if name in record:
            row = record[name]
            times = [f"{row[f'{part}_ms']:.2f}" for part in ("median", "p10", "p90", "best", "limit")]
            table.add_row(name, *times, f"{row['fraction']:.0%}", f"{row['fraction_best']:.0%}", f"{row['flops'] / 1e9:.2f}")
    console.print(table)
    say(console, "limit: the matrix products of the algorithm alone, measured in turns with the code; best of all repeats")
    training = record["end_to_end"]
    if training:
        say(
            console,
            f"training on {training['task']}: {training['decisions_per_s']:.1f} decisions/s, {training['env_steps_per_s']:.1f} simulator "
            f"steps/s, {training['updates_per_s']:.1f} updates/s ({training['decisions']} decisions in {training['seconds']:.1f} s)",
        )
    memory = record["memory"]
    cuda = "" if memory["peak_cuda_mib"] is None else f", {memory['peak_cuda_mib']:.0f} MiB on the GPU"
    say(console, f"peak memory {memory['peak_rss_mib']:.0f} MiB{cuda}; {record['threads']} threads, device {record['device']}")
    say(console, machine_line(record["machine"]))
