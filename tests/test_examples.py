"""The examples run, and show what they say."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_environment():
    result = load("own_environment").main(steps=340)
    assert len(result.returns) == 5 and result.lengths == [50] * 5


def test_own_loss():
    assert load("own_loss").main(steps=80)


def test_own_training_loop():
    assert load("own_training_loop").main(decisions=60).updates > 10


def test_training_components():
    before, after = load("direct_training_with_components").main(steps=8000)
    assert after > 1.5 * before and after > 60
    state, score = load("functional_training_example").main(steps=4000, good_enough=40.0)
    assert state.should_stop and state.agent_steps < 4000 and score > 30
    assert all(score > 25 for score in load("structured_config_training").main(steps=2000))


def test_own_planner():
    assert load("own_planner").main(episodes=2) > -500


def test_own_model():
    assert load("own_model").main(episodes=2) > 47


def test_every_example_has_a_test():
    tested = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in tested for path in FOLDER.glob("*.py"))
