"""Curriculum files: what they mean, and that every mistake in one is told with its place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from worldmpc.config import ConfigError
from worldmpc.opponents.curriculum import read_curriculum
from worldmpc.opponents.pool import SELF_PLAY, Entry, Phase, Schedule

CHECKPOINTS = ("sac.pt", "tdmpc2.pt", "decoy")
COURSE: dict[str, Any] = {
    "curriculum": {
        "phases": [
            {
                "name": "bots",
                "episodes": 3000,
                "environment": {"mode": "NORMAL", "keep_mode": True},
                "opponent": {"type": "basic_strong", "weight": 1.0, "checkpoint": None, "deterministic": True},
                "reward_shaping": {
                    "N": 600,
                    "K": 400,
                    "CLOSENESS_START": 20.0,
                    "CLOSENESS_FINAL": 1.5,
                    "TOUCH_START": 15.0,
                    "TOUCH_FINAL": 1.0,
                    "DIRECTION_START": 0.0,
                    "DIRECTION_FINAL": 2.0,
                },
                "clear_buffer": False,
            },
            {
                "name": "mixture",
                "episodes": 7000,
                "environment": {
                    "mixture": [{"mode": "TRAIN_SHOOTING", "weight": 0.25}, {"mode": "normal", "weight": 0.75}],
                    "keep_mode": True,
                },
                "opponent": {
                    "type": "weighted_mixture",
                    "opponents": [
                        {"type": "basic_weak", "weight": 0.1},
                        {"type": "basic_strong", "weight": 0.2},
                        {"type": "SAC", "weight": 0.25, "checkpoint": "sac.pt", "deterministic": True},
                        {"type": "TDMPC2", "weight": 0.25, "checkpoint": "tdmpc2.pt"},
                        {"type": "DecoyPolicy", "weight": 0.2, "checkpoint": "decoy"},
                    ],
                },
                "reward_shaping": None,
                "reward_bonus": {
                    "N": 100,
                    "K": 2000,
                    "WIN_BONUS_START": 10.0,
                    "WIN_BONUS_FINAL": 1.0,
                    "WIN_DISCOUNT_START": 0.92,
                    "WIN_DISCOUNT_FINAL": 0.5,
                },
            },
            {
                "name": "archive",
                "episodes": 2000,
                "environment": {"keep_mode": True},
                "opponent": {"type": "archive", "skill_range": 5, "distribution": {"pfsp": 0.5, "random": 0.3, "baseline": 0.2}},
                "reward_bonus": {},
                "reward_shaping": {},
            },
            {"name": "self", "episodes": 50000, "opponent": {"type": "self_play", "checkpoint": None}, "clear_buffer": True},
            {"episodes": 1, "opponent": {"type": "self_play", "checkpoint": "sac.pt", "agent_type": "SAC"}},
        ]
    },
    "hyperparameters": {"learning_rate": 3e-4, "batch_size": 512},
    "training": {"warmup_steps": 10000, "updates_per_step": 1},
    "agent": {"type": "TDMPC2", "hyperparameters": {"horizon": 8}, "checkpoint_path": None},
}


def write(folder: Path, data: Any, name: str = "curriculum.json") -> Path:
    for checkpoint in CHECKPOINTS:
        (folder / checkpoint).touch()
    path = folder / name
    path.write_text(json.dumps(data) if path.suffix == ".json" else yaml.safe_dump(data))
    return path


def test_a_file_of_the_course_project(tmp_path: Path) -> None:
    phases, keep = read_curriculum(write(tmp_path, COURSE))
    normal = (({"mode": "NORMAL"}, 1.0),)
    hints = {
        "reward_closeness_to_puck": Schedule(20.0, 1.5, 600, 400),
        "reward_touch_puck": Schedule(15.0, 1.0, 600, 400),
        "reward_puck_direction": Schedule(0.0, 2.0, 600, 400),
    }
    files = [f"{kind}:{tmp_path / name}" for kind, name in zip(("SAC", "TDMPC2", "DECOYPOLICY"), CHECKPOINTS, strict=True)]
    mixture = tuple(Entry(name, weight) for name, weight in zip(("weak", "strong", *files), (0.1, 0.2, 0.25, 0.25, 0.2), strict=True))
    assert keep is True
    assert phases == (
        Phase("bots", (Entry("strong"),), 3000, modes=normal, shaping=hints),
        Phase(
            "mixture",
            mixture,
            7000,
            modes=(({"mode": "TRAIN_SHOOTING"}, 0.25), ({"mode": "NORMAL"}, 0.75)),
            win_bonus=Schedule(10.0, 1.0, 100, 2000),
            win_discount=Schedule(0.92, 0.5, 100, 2000),
            clear_replay=True,  # what the course project does where a phase does not say
        ),
        Phase(
            "archive",
            (Entry(SELF_PLAY, 0.8), Entry("weak", 0.1), Entry("strong", 0.1)),
            2000,
            "pfsp",
            modes=normal,
            shaping=hints,
            win_bonus=Schedule(10.0, 1.0, 0, 2000),
            win_discount=Schedule(0.92, 0.92, 0, 2000),
            clear_replay=True,
        ),
        Phase("self", (Entry(SELF_PLAY),), 50000, modes=normal, clear_replay=True),
        Phase("phases[4]", (Entry(files[0]),), 1, modes=normal, clear_replay=True),
    )


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("name", ["course.yaml", "course.yml"])
def test_the_same_in_yaml_and_with_phases_alone(name: str, inner: bool, tmp_path: Path) -> None:
    data = COURSE if inner else COURSE["curriculum"]
    assert read_curriculum(write(tmp_path, data, name)) == read_curriculum(write(tmp_path, COURSE))


def test_schedules_of_rewards_at_their_start_middle_and_end(tmp_path: Path) -> None:
    phases, _ = read_curriculum(write(tmp_path, COURSE))
    shaping, bonus = phases[0].shaping, phases[1]
    for games, expected in ((0, (20, 15, 0)), (599, (20, 15, 0)), (800, (10.75, 8, 1)), (1000, (1.5, 1, 2)), (9999, (1.5, 1, 2))):
        assert tuple(schedule.at(games) for schedule in shaping.values()) == pytest.approx(expected)
    for games, expected in ((0, (10, 0.92)), (99, (10, 0.92)), (1100, (5.5, 0.71)), (2100, (1, 0.5)), (7000, (1, 0.5))):
        assert (bonus.win_bonus.at(games), bonus.win_discount.at(games)) == pytest.approx(expected)


def test_no_mode_is_said_where_no_phase_says_one(tmp_path: Path) -> None:
    """The task's own mode stays then."""
    path = write(tmp_path, {"phases": [{"episodes": 1, "opponent": {"type": "weak"}}] * 2})
    phases, keep = read_curriculum(path)
    assert keep is None and [phase.modes for phase in phases] == [(({}, 1.0),)] * 2


def test_kinds_of_opponents(tmp_path: Path) -> None:
    def entries(opponent: Any) -> Any:
        (phase,), _ = read_curriculum(write(tmp_path, {"phases": [{"episodes": 1, "opponent": opponent}]}))
        return phase.entries, phase.choose

    assert entries({"type": "none"}) == ((Entry("still"),), "weighted")
    assert entries({"type": "random"}) == ((Entry("random"),), "weighted")
    assert entries({"type": "self_play", "checkpoint": "latest"}) == ((Entry(SELF_PLAY),), "weighted")
    assert entries({"checkpoint": "sac.pt"}) == ((Entry(str(tmp_path / "sac.pt")),), "weighted")
    assert entries({"type": "self_play", "checkpoint": str(tmp_path / "sac.pt")}) == ((Entry(str(tmp_path / "sac.pt")),), "weighted")
    assert entries({"type": "run_checkpoints"})[1] == "pfsp"
    assert entries({"type": "archive", "distribution": {"random": 1.0}}) == ((Entry(SELF_PLAY, 1.0),), "weighted")
    assert entries({"type": "archive", "distribution": {"baseline": 1.0}}) == ((Entry("weak", 0.5), Entry("strong", 0.5)), "weighted")
    equal = {"type": "weighted_mixture", "opponents": [{"type": "weak"}, {"type": "self_play"}]}
    assert entries(equal) == ((Entry("weak"), Entry(SELF_PLAY)), "weighted")


P0 = ("curriculum", "phases", 0)
P1 = ("curriculum", "phases", 1)
WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    ((), {"curiculum": {}}, ": unknown key 'curiculum'; known are curriculum, phases, hyperparameters, training, agent"),
    ((), [], ": expected keys with values, got []"),
    ((), {"hyperparameters": {}}, ": expected curriculum.phases, a list with at least one phase"),
    (("phases",), [], ": expected curriculum.phases or phases, got both"),
    (("curriculum", "phases"), [], ": expected curriculum.phases, a list with at least one phase"),
    (("curriculum", "phases"), "all", ": expected curriculum.phases, a list with at least one phase"),
    (("curriculum", "fases"), [], ": curriculum: unknown key 'fases'"),
    (P0, "bots", ": phases[0]: expected keys with values, got 'bots'"),
    ((*P0, "episode"), 3, ": phases[0]: unknown key 'episode'; known are name, episodes"),
    ((*P0, "episodes"), 0, ": phases[0].episodes: expected a number of at least 1, got 0"),
    ((*P0, "episodes"), 2.5, ": phases[0].episodes: expected a whole number, got 2.5"),
    ((*P0, "episodes"), "many", ": phases[0].episodes: expected a number of at least 1, got 'many'"),
    ((*P0, "episodes"), True, ": phases[0].episodes: expected a number of at least 1, got True"),
    ((*P0, "clear_buffer"), "no", ": phases[0].clear_buffer: expected true or false, got 'no'"),
    ((*P0, "environment"), [], ": phases[0].environment: expected keys with values, got []"),
    ((*P0, "environment", "mod"), 1, ": phases[0].environment: unknown key 'mod'; known are mode, mixture, keep_mode"),
    (
        (*P0, "environment", "mode"),
        "FAST",
        ": phases[0].environment.mode: expected one of NORMAL, TRAIN_SHOOTING, TRAIN_DEFENSE, got 'FAST'",
    ),
    ((*P0, "environment", "mode"), 1, ": phases[0].environment.mode: expected one of NORMAL"),
    ((*P0, "environment", "keep_mode"), 1, ": phases[0].environment.keep_mode: expected true or false, got 1"),
    ((*P0, "environment", "keep_mode"), False, ": expected the same keep_mode everywhere"),
    ((*P0, "environment", "mixture"), [{"mode": "NORMAL"}], ": phases[0].environment: expected mode or mixture, got both"),
    ((*P1, "environment", "mixture"), [], ": phases[1].environment.mixture: expected a list that is not empty, got []"),
    ((*P1, "environment", "mixture", 0, "weigth"), 1, ": phases[1].environment.mixture[0]: unknown key 'weigth'"),
    ((*P1, "environment", "mixture", 1, "mode"), "?", ": phases[1].environment.mixture[1].mode: expected one of NORMAL"),
    ((*P1, "environment", "mixture", 0, "weight"), 0.3, ": phases[1].environment.mixture: weights sum to 1.05, not to 1 (0.3, 0.75)"),
    (
        (*P1, "environment", "mixture", 0, "weight"),
        -0.3,
        ": phases[1].environment.mixture[0].weight: expected a number of at least 0, got -0.3",
    ),
    ((*P1, "environment", "mixture", 0, "keep_mode"), False, ": phases[1].environment: expected the same keep_mode everywhere"),
    ((*P0, "opponent"), "weak", ": phases[0].opponent: expected keys with values, got 'weak'"),
    ((*P0, "opponent"), {}, ": phases[0].opponent: type is missing"),
    ((*P0, "opponent", "typ"), 1, ": phases[0].opponent: unknown key 'typ'; known are type, weight, checkpoint"),
    ((*P0, "opponent", "type"), "basic_week", ": phases[0].opponent.type: 'basic_week' cannot be had here; did you mean basic_weak?"),
    ((*P0, "opponent", "type"), "TDMPC3", ": phases[0].opponent.type: 'TDMPC3' cannot be had here; did you mean TDMPC2?"),
    ((*P0, "opponent", "type"), "CrossQ!", ": phases[0].opponent.type: 'CrossQ!' cannot be had here; known are basic_weak"),
    ((*P0, "opponent", "type"), 7, ": phases[0].opponent.type: expected a text, got 7"),
    ((*P0, "opponent", "type"), "SAC", ": phases[0].opponent.checkpoint: is missing; SAC needs the path of one"),
    ((*P0, "opponent"), {"type": "SAC", "checkpoint": 3}, ": phases[0].opponent.checkpoint: expected a text, got 3"),
    ((*P0, "opponent"), {"type": "SAC", "checkpoint": "none.pt"}, ": phases[0].opponent.checkpoint: none.pt: no such file or folder"),
    ((*P1, "opponent", "opponents"), [], ": phases[1].opponent.opponents: expected a list that is not empty, got []"),
    ((*P1, "opponent", "opponents", 0), "weak", ": phases[1].opponent.opponents[0]: expected keys with values, got 'weak'"),
    ((*P1, "opponent", "opponents", 1, "wieght"), 1, ": phases[1].opponent.opponents[1]: unknown key 'wieght'"),
    (
        (*P1, "opponent", "opponents", 1, "weight"),
        "1",
        ": phases[1].opponent.opponents[1].weight: expected a number of at least 0, got '1'",
    ),
    (
        (*P1, "opponent", "opponents", 1, "weight"),
        1,
        ": phases[1].opponent.opponents: weights sum to 1.8, not to 1 (0.1, 1, 0.25, 0.25, 0.2)",
    ),
    ((*P1, "opponent", "opponents", 3, "checkpoint"), "x.pt", ": phases[1].opponent.opponents[3].checkpoint: x.pt: no such file"),
    ((*P1, "opponent", "opponents", 0, "type"), "archive", ": phases[1].opponent.opponents[0].type: 'archive' cannot be had here"),
    (("curriculum", "phases", 2, "opponent", "distribution", "elo"), 1, ": phases[2].opponent.distribution: unknown key 'elo'"),
    (("curriculum", "phases", 2, "opponent", "distribution", "pfsp"), 1, ": phases[2].opponent.distribution: weights sum to 1.5"),
    (("curriculum", "phases", 2, "opponent", "distribution", "pfsp"), None, ": phases[2].opponent.distribution.pfsp: expected a number"),
    ((*P0, "reward_shaping"), [1], ": phases[0].reward_shaping: expected keys with values, got [1]"),
    ((*P0, "reward_shaping", "TOUCH"), 1, ": phases[0].reward_shaping: unknown key 'TOUCH'; known are N, K, CLOSENESS_START"),
    ((*P0, "reward_shaping", "N"), -1, ": phases[0].reward_shaping.N: expected a number of at least 0, got -1"),
    ((*P0, "reward_shaping", "TOUCH_START"), float("nan"), ": phases[0].reward_shaping.TOUCH_START: expected a finite number, got nan"),
    ((*P1, "reward_bonus", "WIN"), 1, ": phases[1].reward_bonus: unknown key 'WIN'"),
    ((*P1, "reward_bonus", "WIN_BONUS_FINAL"), None, ": phases[1].reward_bonus.WIN_BONUS_FINAL: expected a finite number, got None"),
]


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize(("place", "value", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_a_mistake_is_told_with_its_place(place: tuple[Any, ...], value: Any, message: str, suffix: str, tmp_path: Path) -> None:
    data: Any = copy.deepcopy(COURSE)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if place:
        inner[place[-1]] = value
    else:
        data = value
    path = write(tmp_path, data, f"wrong{suffix}")
    with pytest.raises(ConfigError) as caught:
        read_curriculum(path)
    assert str(caught.value).startswith(f"opponents: {path}{message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["episodes", "opponent"])
def test_what_a_phase_needs(key: str, tmp_path: Path) -> None:
    data = copy.deepcopy(COURSE)
    del data["curriculum"]["phases"][1][key]
    with pytest.raises(ConfigError, match=rf"phases\[1\]: {key} is missing"):
        read_curriculum(write(tmp_path, data))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{phases: 1}", r"a.json: is no JSON \(.*line 1"),
        ("a.yaml", b"phases:\n  - {a: [}\n", r"a.yaml: is no YAML \(.*line 2"),
        ("a.yaml", b"", "a.yaml: expected keys with values, got None"),
        ("a.json", b"\xff\xfe\x00", "a.json: is no JSON"),
        ("missing.json", None, r"missing.json: cannot be read \(No such file or directory\)"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_curriculum(tmp_path / name)
    assert "\n" not in str(caught.value)
