"""The weights of a run, out of a bundle or a checkpoint, put into a model that was just made."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_NESTED = ("model", "state_dict", "model_state_dict", "module")
_LOST_PREFIXES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class WeightsError(ValueError):
    """Weights can't be read, or do not fit; the message says why and what to do about it."""


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the model these parameters and buffers, in their own types.

    Raises:
        WeightsError: a name or a shape does not fit.
    """
    own: dict[str, Tensor] = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    own |= {plain_name(n): b for n, b in model.named_buffers(remove_duplicate=False)}
    given = {plain_name(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    if given and not any(name in own for name in given) and all(name.startswith("module.") for name in given):
        given = {name.removeprefix("module."): value for name, value in given.items()}  # saved from a DDP object
    strange = [name for name in given if name not in own]
    filled = {id(own[name]) for name in given if name in own}
    needed = map(plain_name, model.state_dict())
    missing = [name for name in needed if name in own and id(own[name]) not in filled]
    wrong = [n for n, v in given.items() if n in own and v.shape != own[n].shape]
    if wrong:
        name = wrong[0]
        raise WeightsError(
            f"the weights do not fit the model: {name} is {tuple(given[name].shape)} there and {tuple(own[name].shape)}"
            " in the model; name the factory with the sizes of the run"
        )
    if strange or missing:
        told = [f"the model has no {strange[0]}"] if strange else []
        told += [f"the weights have no {missing[0]}"] if missing else []
        raise WeightsError(f"the weights do not fit the model: {' and '.join(told)}; give those of this model")
    for name, value in given.items():
        own[name].data = value.detach().to(own[name].device, copy=True)


def load_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict out of a checkpoint, also from under `model`, `state_dict` or `model_state_dict`.

    Raises:
        WeightsError: it is not there, or not such a file.
    """
    if path.is_dir():
        raise WeightsError(
            f"--weights {path} is a directory; of torch.distributed.checkpoint's make one file by"
            f" `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt`"
        )
    if not path.is_file():
        raise WeightsError(f"--weights {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"--weights {path} holds more than tensors, and nothing is executed from it: save model.state_dict() alone"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise WeightsError(f"--weights {path} can't be read as torch.save writes it ({type(error).__name__})") from None
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"--weights {path} holds no state dict, nor one under {', '.join(_NESTED)}")
    return content


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _LOST_PREFIXES)
