"""Reader of the published TD-MPC2 checkpoints, in both of their key formats."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from worldmpc.config import ConfigError, ModelConfig
from worldmpc.models.world_model import WorldModel

_OLD_LAYER_KEYS = ("weight", "bias", "ln.weight", "ln.bias")
_NETWORKS = {"_encoder.state": "encoder", "_dynamics": "dynamics", "_reward": "reward", "_pi": "pi", "_termination": "termination"}
_CRITICS = {"_Qs.params": "q", "_target_Qs_params": "target_q", "_target_Qs.params": "target_q"}


def load_official(path: str | Path) -> WorldModel:
    """Read a published ``.pt`` file into a world model on the CPU; all sizes come from the tensors.

    The latent keeps the published order of its entries, and termination the published threshold. No pickled code is run.

    Raises:
        ConfigError: the file is no such checkpoint, or holds a multi-task or pixel model.
        FileNotFoundError: there is no such file.
    """
    parameters = convert_official(_read(Path(path)), str(path))
    try:
        model = WorldModel(
            infer_config(parameters),
            obs_dim=parameters["encoder.0.weight"].shape[1],
            action_dim=parameters["pi.2.weight"].shape[0] // 2,
            terminates="termination.0.weight" in parameters,
        )
        model.load_state_dict(parameters)
    except KeyError as error:
        raise ConfigError(f"{path}: not a complete TD-MPC2 checkpoint, no {error}") from error
    except (RuntimeError, IndexError) as error:
        raise ConfigError(f"{path}: tensors do not form a TD-MPC2 model: {' '.join(str(error).split())}") from error
    return model


def is_official(path: str | Path) -> bool:
    """Tell whether a path looks like a published checkpoint rather than one of ours."""
    return Path(path).suffix == ".pt"


def convert_official(state: Mapping[str, object], origin: str = "checkpoint") -> dict[str, Tensor]:
    """Rename published parameters to ours, without changing the input.

    Raises:
        ConfigError: a part is missing, or the model is of a kind that is not supported.
    """
    if "_task_emb.weight" in state:
        raise ConfigError(f"{origin}: multi-task checkpoints are not supported yet, only single-task ones")
    if any(name.startswith("_encoder.rgb") for name in state):
        raise ConfigError(f"{origin}: pixel checkpoints are not supported yet, only state ones")
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or name.rsplit(".", 1)[-1] not in ("weight", "bias") and not re.search(r"params\.\d+$", name):
            continue
        for prefix, ours in _NETWORKS.items():
            if name.startswith(prefix + "."):
                converted[ours + name[len(prefix) :]] = value.float()
        for prefix, ours in _CRITICS.items():
            if name.startswith(prefix + "."):
                converted[f"{ours}.layers.{_critic_key(name[len(prefix) + 1 :])}"] = value.float()
    missing = [
        part
        for part in ("encoder", "dynamics", "reward", "pi", "q", "target_q")
        if not any(key.startswith(f"{part}.") for key in converted)
    ]
    if missing:
        raise ConfigError(f"{origin}: not a TD-MPC2 checkpoint, no parameters of {', '.join(missing)}")
    return converted


def infer_config(parameters: Mapping[str, Tensor]) -> ModelConfig:
    """Return the configuration whose model has tensors of these shapes."""
    encoder_layers = len({key.split(".")[1] for key in parameters if key.startswith("encoder.")})
    return ModelConfig(
        enc_dim=parameters["encoder.0.weight"].shape[0],
        mlp_dim=parameters["dynamics.0.weight"].shape[0],
        latent_dim=parameters["dynamics.2.weight"].shape[0],
        num_enc_layers=encoder_layers,
        num_q=parameters["q.layers.0.weight"].shape[0],
        num_bins=parameters["reward.2.weight"].shape[0],
        simnorm_layout="consecutive",
        continuation="hard",
    )


def _critic_key(key: str) -> str:
    """Old files number the tensors through all layers (0 to 9), new ones name layer and tensor."""
    if not key.isdigit():
        return key
    layer, part = divmod(int(key), len(_OLD_LAYER_KEYS))
    return f"{layer}.{_OLD_LAYER_KEYS[part]}"


def _read(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path}: not a readable PyTorch checkpoint of plain tensors ({type(error).__name__})") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path}: not a TD-MPC2 checkpoint, no dictionary of parameters")
    return state
