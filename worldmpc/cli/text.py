"""Help texts, made from the configuration's own words. Imports neither torch nor Hydra."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from worldmpc.cli.words import Option
from worldmpc.config import AGENTS, PRESETS, SWEEPS, TUNED, RunConfig, flat_fields

COMMANDS = {
    "train": "train an agent on a task",
    "evaluate": "play episodes with a trained agent, ours or a published checkpoint",
    "tournament": "let players of a game of two play everybody against everybody, and rate them",
    "clone": "train a decoy: a policy that does what an opponent was seen to do",
    "play": "play a game of hockey with the keyboard against an agent or a bot",
    "compare": "hold runs against published learning curves",
    "report": "draw learning curves, export results as CSV",
    "bench": "measure speed against what this machine's matrix products allow",
    "tasks": "list tasks",
}

EVALUATE = {
    "checkpoint": Option(None, "a run folder (its best checkpoint), a checkpoint folder, or a published .pt file"),
    "task": Option(None, "suite/name; needed for a published file, else the one trained on"),
    "episodes": Option(10, "episodes to play; of games of two against each opponent", int),
    "opponents": Option(
        None,
        "games of two: whom to play, as [weak,strong], TYPE:path or the path of a run, checkpoint or decoy; default: whom evaluations of "
        "its training played",
    ),
    "seed": Option(1, "seed of episodes and planning", int),
    "mode": Option("eval", "eval: plan; prior: act with the policy alone", str, ("eval", "prior")),
    "video": Option(None, "also record one episode into this mp4"),
    "device": Option("auto", "auto, cpu, cuda or cuda:<index>"),
    "threads": Option(0, "CPU threads for torch; 0: chosen from the network width", int),
    "json": Option(None, "also write all numbers to this file; -: print them instead of the table"),
}
TOURNAMENT = {
    "task": Option("hockey", "a game of two whose players are alike"),
    "players": Option(
        None, "who plays, as [weak,strong,random,still,runs/a,SAC:runs/b,DECOYPOLICY:decoys/c]; mine=runs/a is called mine in tables"
    ),
    "games": Option(100, "games of each pair", int),
    "seed": Option(1, "seed of all games, and of the order in which ratings see them", int),
    "mode": Option("eval", "eval: agents plan; prior: they act with their policy alone", str, ("eval", "prior")),
    "out": Option(None, "folder for tournament.json, tournament.png and history.jsonl; default results/<task>/tournament"),
    "threads": Option(1, "CPU threads for torch", int),
}
CLONE = {
    "task": Option("hockey", "a game of two"),
    "opponent": Option(None, "who is cloned: weak, strong, TYPE:path, or the path of a run or checkpoint"),
    "against": Option("[weak,strong]", "whom it plays while it is watched"),
    "games": Option(200, "games against each of them", int),
    "out": Option(None, "folder of the decoy; a decoy that is there is replaced"),
    "hidden": Option("[128,128]", "widths of the hidden layers"),
    "holdout": Option(0.2, "share of the games that training does not see", float),
    "epochs": Option(100, "passes over the other games at most", int),
    "patience": Option(5, "passes without improvement on the games held out after which training ends", int),
    "batch_size": Option(256, "steps per update", int),
    "lr": Option(1e-3, "learning rate", float),
    "seed": Option(1, "seed of games and training", int),
    "threads": Option(1, "CPU threads for torch", int),
}
PLAY = {
    "task": Option("hockey", "hockey/self-play, or one of its training modes"),
    "checkpoint": Option(None, "a run or checkpoint to play against"),
    "opponent": Option(None, "instead of a checkpoint: weak, strong, random, still, TYPE:path or a path"),
    "seat": Option(1, "1: play on the left; 2: on the right", int),
    "games": Option(1, "games to play; you begin the first one, then players take turns", int),
    "mode": Option("eval", "eval: an agent plans; prior: it acts with its policy alone, faster", str, ("eval", "prior")),
    "seed": Option(1, "seed of games and opponent", int),
    "threads": Option(1, "CPU threads for torch", int),
}
COMPARE = {
    "algorithm": Option("tdmpc2", "published curves to compare with; with variants=true also several, with commas"),
    "at": Option(
        None,
        "simulator step; default: the last published one that all seeds have reached; with variants=true the last one at which all runs "
        "of a task were evaluated",
        int,
    ),
    "variants": Option("false", "hold labels (see label= of train) against each other, per task and aggregated", str, ("true", "false")),
    "baseline": Option(None, "label that the others are asked to be better than; default tdmpc2; needs variants=true"),
    "json": Option(None, "also write the comparison to this file; -: print it instead of the table"),
}
REPORT = {
    "out": Option(None, "image to draw; default curves.png, or none where export= is given"),
    "export": Option(None, "result CSV to write"),
    "algorithm": Option("tdmpc2", "published curves to draw beside ours"),
}
BENCH = {
    "obs_dim": Option(24, "observation dimensions of the synthetic data", int),
    "action_dim": Option(6, "action dimensions of the synthetic data", int),
    "repeats": Option(20, "measured plans and updates", int),
    "seconds": Option(5.0, "seconds of the environment and of the training measurement on task each; 0: leave both out", float),
    "json": Option(None, "also write all numbers to this file, after every configuration; -: print them instead of the table"),
    "compare": Option(None, "a file that json= wrote earlier, to hold rows with the same settings against"),
}
BENCH_PLANNERS = {
    "task": Option(
        None, "plan with the known equations of these tasks; default, where there is no checkpoint: Pendulum, CartPole, Acrobot"
    ),
    "checkpoint": Option(None, "plan with the learned models of these runs or checkpoints"),
    "planners": Option(
        None,
        "some of random_shooting, cem, icem, mppi, policy_guided, diffusion, mcts, cem+gradient, which are the default, diffusion+prior "
        "and diffusion+guidance, which need a run with planner.prior=learned",
    ),
    "evaluations": Option("2000", "model steps that a decision may imagine; one number, or one for each task and checkpoint"),
    "horizon": Option(None, "likewise; default: 20 (Acrobot 50, the mountain cars 100), of a checkpoint what it was trained with"),
    "iterations": Option(6, "of planners that refine, as far as evaluations allow", int),
    "episodes": Option(10, "episodes per seed", int),
    "seeds": Option("1,2,3", "seeds of episodes and planning"),
    "repeats": Option(10, "timed decisions", int),
    "threads": Option(1, "CPU threads for torch", int),
    "device": Option("cpu", "auto, cpu, cuda or cuda:<index>"),
    "json": Option(None, "also write all numbers to this file, after every planner; -: print them instead of the table"),
}
OPTIONS: dict[str, dict[str, Option]] = {
    "evaluate": EVALUATE,
    "tournament": TOURNAMENT,
    "clone": CLONE,
    "play": PLAY,
    "compare": COMPARE,
    "report": REPORT,
    "bench": BENCH,
}

_USAGE = {
    "train": "worldmpc train [key=value ...] [-m key=value,value ...] [sweep=NAME]",
    "evaluate": "worldmpc evaluate checkpoint=PATH [task=...] [name=value ...] [planner.*=... env.*=... compile=...]",
    "tournament": "worldmpc tournament players=[...] [name=value ...]",
    "clone": "worldmpc clone opponent=... out=PATH [name=value ...]",
    "play": "worldmpc play checkpoint=PATH|opponent=... [name=value ...]",
    "compare": "worldmpc compare PATH... [name=value ...]",
    "report": "worldmpc report PATH... [name=value ...]",
    "bench": "worldmpc bench [name=value ...] [key=value,value ...]\n"
    "       worldmpc bench planners [name=value ...] [planner.*=... env.*=...]",
    "tasks": "worldmpc tasks [SUITE]",
}
_ABOUT = {
    "train": """
        Writes metrics, evaluations, checkpoints, a learning curve and a video into the run's folder. Ctrl-C or SIGTERM saves and
        stops; resume=auto goes on. Values are defaults, then the preset's, then yours; a key of yours that the
        agent never reads is refused. -m (--multirun) trains one run per
        combination of comma-separated values, through Hydra's launchers; sweep=NAME one per configuration of a named set, listed
        below, and what else you set is for all of them. --cfg prints the configuration without training.

        Exit status: 0 done, or stopped by SIGTERM and saved; 1 failed while running; 2 input that cannot be used; 130 Ctrl-C.""",
    "evaluate": """
        A published file is planned with as published; planner.* and env.* keys of `worldmpc train --help` change that, for our
        checkpoints as well.

        Games of two are played from both seats and, in hockey, with both starters: games won, drawn and lost against each opponent, with
        95 % intervals (Wilson). json= holds every game, video= shows one against the first opponent.""",
    "tournament": """
        Every pair plays the same number of games, from both seats and, in hockey, with both starters. Each game is a line of
        history.jsonl in the folder; the same command again plays only what is missing, and more players or games can be added.

        Ratings are those of openskill (Bradley-Terry; mu 25, sigma 25/3; a draw is half a win), the mean over 20 random orders of all
        games, as their order says nothing of players who do not learn. Tables are sorted by mu - 3 sigma.""",
    "clone": """
        Lets the opponent play, and learns what it does from what it sees: a distribution over bins of every action, by maximum
        likelihood, until games held out are no longer predicted better. It is held against the frequencies of the actions alone.

        The decoy is an opponent of the type DECOYPOLICY for train, evaluate, tournament and play.""",
    "play": """
        Arrows push, w and s turn, space shoots; keys work together, and arrows point as on the screen from both seats. Esc or
        closing the window ends it. Needs a display.""",
    "compare": """
        Paths are run folders, folders of them at any depth, and result CSVs. One line per task, agent and preset: ours and the
        published return at equal simulator steps, and whether our mean reaches the lowest published seed.

        variants=true: one table per task with a line per label (runs without one have their agent's name), and one of normalised scores
        (return / 1000, tasks of dmc) over the tasks that all labels have: interquartile mean and probability of improvement over the
        baseline, with 95 % intervals of a stratified bootstrap (Agarwal et al. 2021). Nothing is interpolated.""",
    "report": """
        Paths are run folders, folders of them at any depth, and result CSVs. One panel per task, one line per label (runs without one
        have their agent's name), preset and planner.""",
    "bench": """
        Milliseconds per plan and per update on synthetic data, beside the time that their matrix products alone take, measured
        in the same run; then decisions per second of the environments alone and of training on task. Keys are those of
        `worldmpc train --help`; lists of values measure every combination, one row each. A configuration that fails is named, the
        others are measured nevertheless.""",
    "tasks": """
        Suites are dmc, gym, toy, maze and hockey; gym also takes gym/<module>:<EnvId>, which imports the module first. Names without a
        suite, listed last, stand for a task, an agent and its settings; they are for train.""",
}
_EXAMPLES = {
    "train": (
        "worldmpc train task=dmc/walker-walk preset=cpu",
        "worldmpc train agent=dqn task=gym/CartPole-v1",
        "worldmpc train agent=mpc planner=cem task=gym/Pendulum-v1",
        "worldmpc train task=gym/HalfCheetah-v5 planner.horizon=5 device=cuda",
        "worldmpc train task=dmc/cheetah-run -m seed=1,2,3",
        "worldmpc train task=dmc/cheetah-run seeds=[1,2,3]",
        "worldmpc train task=dmc/cheetah-run resume=auto",
        "worldmpc train agent=bmpc task=dmc/dog-walk",
        "worldmpc train sweep=multi_gamma_ablation task=dmc/cheetah-run -m seed=1,2,3",
    ),
    "evaluate": (
        "worldmpc evaluate checkpoint=runs/dmc-walker-walk/tdmpc2-cpu-seed1 video=walk.mp4",
        "worldmpc evaluate checkpoint=dog-run-1.pt task=dmc/dog-run episodes=3",
        "worldmpc evaluate checkpoint=runs/hockey-self-play/tdmpc2-cpu-seed1 opponents=[weak,strong] episodes=200",
    ),
    "tournament": (
        "worldmpc tournament players=[weak,strong,random,still] games=40",
        "worldmpc tournament players=[weak,strong,tdmpc2=runs/hockey-self-play/tdmpc2-cpu-seed1] out=results/hockey/tournament",
    ),
    "clone": ("worldmpc clone opponent=strong out=decoys/strong",),
    "play": (
        "worldmpc play opponent=strong",
        "worldmpc play checkpoint=runs/hockey-self-play/tdmpc2-cpu-seed1 seat=2 games=3",
    ),
    "compare": (
        "worldmpc compare runs at=100000",
        "worldmpc compare runs/dmc-walker-walk results.csv json=-",
        "worldmpc compare results/variants/*.csv variants=true algorithm=tdmpc2,bmpc-1m",
    ),
    "report": (
        "worldmpc report runs out=curves.png",
        "worldmpc report runs export=results/mine.csv",
        "worldmpc report results/variants/*.csv out=docs/variants.png",
    ),
    "bench": (
        "worldmpc bench model.size=cpu,1,5 threads=1 json=old.json",
        "worldmpc bench model.size=cpu,1,5 threads=1 compare=old.json",
        "worldmpc bench device=cuda planner.precision=fp32,bf16 env.num_envs=1,8 compile=true json=gpu.json",
        "worldmpc bench planners task=gym/Pendulum-v1,gym/CartPole-v1 evaluations=2000 json=planners.json",
        "worldmpc bench planners checkpoint=runs/dmc-walker-walk/tdmpc2-cpu-seed1 planners=mppi,cem,icem",
    ),
    "tasks": ("worldmpc tasks", "worldmpc tasks dmc"),
}
_PLANNERS = """
    `worldmpc bench planners` lets all planners plan with the same model, at an equal number of imagined model steps per decision:
    the return they reach, and milliseconds per decision. Their sizes follow from evaluations=; planner.* and env.* keys of
    `worldmpc train --help` change the rest, for all of them."""
_LEFT = 34


def overview() -> str:
    """Return the text of ``worldmpc --help``."""
    lines = ["usage: worldmpc COMMAND [key=value ...]", "", "Planning with learned world models.", ""]
    lines += list(_rows(COMMANDS))
    lines += ["", "`worldmpc COMMAND --help` explains a command, `worldmpc --version` names the version.", ""]
    lines += ["examples:", *(f"  {examples[0]}" for examples in _EXAMPLES.values())]
    lines += ["", "WORLDMPC_TRACEBACK=1 in the environment adds tracebacks to errors."]
    return "\n".join(lines) + "\n"


def command_help(command: str) -> str:
    """Return the text of ``worldmpc <command> --help``."""
    lines = [f"usage: {_USAGE[command]}", "", f"{COMMANDS[command].capitalize()}.", *_paragraphs(_ABOUT[command])]
    if command in OPTIONS:
        lines += ["", "options (name=value, or --name value):"]
        lines += _rows({_option_name(name, option): option.help for name, option in OPTIONS[command].items()})
    if command == "bench":
        lines += [*_paragraphs(_PLANNERS), "", "options of it:"]
        lines += _rows({_option_name(name, option): option.help for name, option in BENCH_PLANNERS.items()})
    if command == "train":
        lines += _keys() + _layers()
    lines += ["", "examples:", *(f"  {example}" for example in _EXAMPLES[command])]
    return "\n".join(lines) + "\n"


def _keys() -> list[str]:
    """Every configuration key with default, type and meaning, one block per section."""
    hints = typing.get_type_hints(RunConfig)
    sections = {name: typing.cast(type, kind) for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    lines: list[str] = []
    for section, cls in {"": RunConfig, **sections}.items():
        lines += ["", f"{(cls.__doc__ or '').strip().rstrip('.')}:"]
        own = dict(flat_fields(cls, f"{section}." if section else ""))
        kinds = typing.get_type_hints(cls)
        rows = {
            f"{name}={_plain(item.default)}": f"[{_kind(kinds[item.name])}] {item.metadata['help']}"
            for name, item in own.items()
            if section or "." not in name
        }
        lines += _rows(rows)
    return lines


def _layers() -> list[str]:
    agents = {f"agent={name}": ", ".join(_flat(values)) or "the defaults above" for name, values in AGENTS.items()}
    presets = {f"preset={name}": ", ".join(_flat(values)) or "nothing" for name, values in PRESETS.items()}
    presets["preset=cpu"] += " (TD-MPC2 and its relatives; other agents are small anyway)"
    tuned = "; ".join(f"{agent}: {', '.join(tasks)}" for agent, tasks in TUNED.items())
    presets["preset=tuned"] = f"settings of its own for each of {tuned}"
    sweeps = {
        f"sweep={name}": "; ".join(f"{label}: {' '.join(own) or 'as it is'}" for label, own in each.items())
        for name, each in SWEEPS.items()
    }
    lines = ["", "Agents, and what they change:", *_rows(agents), "", "Presets, and what they change then:", *_rows(presets)]
    return [*lines, "", "Named sets, with the label of each configuration and what it changes:", *_rows(sweeps)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_plain(value)}"


def _option_name(name: str, option: Option) -> str:
    return f"{name}={'|'.join(option.choices) if option.choices else '' if option.default is None else _plain(option.default)}"


def _plain(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_plain, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _kind(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if argument is type(None) else _kind(argument) for argument in arguments)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    return {bool: "true|false", int: "int", float: "float", str: "text"}[kind]


def _width() -> int:
    return max(min(shutil.get_terminal_size((120, 24)).columns, 140), 60)


def _rows(rows: Mapping[str, str]) -> Iterator[str]:
    """Two columns; a left part that is too wide has a line of its own."""
    for left, right in rows.items():
        wrapped = textwrap.wrap(right, _width() - _LEFT - 2, break_on_hyphens=False) or [""]
        if len(left) >= _LEFT:
            yield f"  {left}"
        else:
            yield f"  {left:<{_LEFT}}{wrapped.pop(0)}"
        yield from (f"  {'':<{_LEFT}}{line}" for line in wrapped)


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in textwrap.dedent(text).strip().split("\n\n"):
        yield from ("", *textwrap.wrap(" ".join(paragraph.split()), _width()))
