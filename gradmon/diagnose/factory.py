"""What a user names as `module:name` on the command line: a model's factory, a loader, a loss."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gradmon.importing import TrainsOnImportError, only_looking


class FactoryError(ValueError):
    """A name given as `module:name` is of no use; the message says why and what to do about it."""


def named(spec: str, option: str) -> Any:
    """The object that `module:name` stands for; the working directory is looked in too, as by `python -m`.

    Args:
        spec: `package.module:name`, the name may be dotted.
        option: where it was given, `--model`; errors begin with it.

    Raises:
        FactoryError: it isn't written so, can't be imported, or the module has no such name.
    """
    module_name, colon, path = spec.partition(":")
    if not colon or not module_name or not path:
        raise FactoryError(f"{option} must be module:name (got {spec!r}), such as train:make_model")
    if module_name.endswith(".py") or "/" in module_name or module_name.startswith("."):
        file = Path(module_name)
        where = f", run in {file.parent}" if file.parent != Path() else ""
        raise FactoryError(
            f"{option} must name a module, not a file (got {spec!r}): {file.name.removesuffix('.py')}:{path}{where}"
        )
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        with only_looking():
            found: Any = importlib.import_module(module_name)
    except TrainsOnImportError:
        raise FactoryError(
            f"{option} {spec}: {module_name} trains when it is imported: put the training under"
            f" `if __name__ == '__main__':` and name the function that makes the {_wanted(option)}"
        ) from None
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise FactoryError(f"{option} {spec}: importing {module_name} needs {error.name}; install it") from None
        raise FactoryError(
            f"{option} {spec}: no module {error.name}; run this where it lies, or put that directory in PYTHONPATH"
        ) from None
    except SystemExit as error:
        raise FactoryError(f"{option} {spec}: importing {module_name} {_ended(error)}") from None
    except SyntaxError as error:
        raise FactoryError(f"{option} {spec}: {module_name} is no valid Python: {error}") from None
    except Exception as error:  # the user's module runs here: whatever it raises is told as it is
        raise FactoryError(
            f"{option} {spec}: importing {module_name} failed with {_told(error)};"
            " a script that trains when it is imported needs `if __name__ == '__main__':`"
        ) from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise FactoryError(f"{option} {spec}: {module_name} has no {part!r}; check how it is spelt") from None
    return found


def function(spec: str, option: str) -> Callable[..., Any]:
    """The function, class or other callable that `module:name` stands for.

    Raises:
        FactoryError: as `named`, or it can't be called.
    """
    found = named(spec, option)
    if not callable(found):
        raise FactoryError(f"{option} {spec} must be a function (got a {type(found).__name__})")
    called: Callable[..., Any] = found
    return called


def made(spec: str, option: str) -> Any:
    """What the function `module:name` returns when it is called without arguments.

    Raises:
        FactoryError: as `function`, or it needs arguments, or it fails.
    """
    factory = function(spec, option)
    needed = _needed(factory)
    if needed:
        raise FactoryError(
            f"{option} {spec} needs arguments ({', '.join(needed)});"
            " name a function without any, such as `def make_model(): return Net(...)`"
        )
    try:
        with only_looking():
            return factory()
    except TrainsOnImportError:
        raise FactoryError(
            f"{option} {spec}: {spec.partition(':')[2]} trains when it is called: name the function that makes the"
            f" {_wanted(option)} and does nothing else"
        ) from None
    except SystemExit as error:
        raise FactoryError(f"{option} {spec} {_ended(error)}") from None
    except Exception as error:  # the user's function: whatever it raises is told as it is
        raise FactoryError(f"{option} {spec} failed with {_told(error)}") from error


def model(spec: str, option: str = "--model") -> nn.Module:
    """The model that `module:factory` makes; a module that lies there ready is taken as it is.

    Raises:
        FactoryError: as `made`, or what it returns is no module.
    """
    found = named(spec, option)
    if not isinstance(found, nn.Module):
        found = made(spec, option)
    if not isinstance(found, nn.Module):
        raise FactoryError(f"{option} {spec} must return a torch.nn.Module (got a {type(found).__name__})")
    return found


def loss(spec: str, option: str = "--loss") -> Callable[..., Any]:
    """The loss function that `module:name` stands for; of a class, such as `torch.nn:CrossEntropyLoss`, an instance.

    Raises:
        FactoryError: as `function`; of a class, as `made`.
    """
    found = function(spec, option)
    if not isinstance(found, type):
        return found
    if needed := _needed(found):
        raise FactoryError(
            f"{option} {spec} needs arguments ({', '.join(needed)}); name an instance, such as `criterion ="
            f" {found.__name__}(...)`"
        )
    instance = made(spec, option)
    if not callable(instance):
        raise FactoryError(f"{option} {spec} must be a loss (got a {type(instance).__name__}, which can't be called)")
    called: Callable[..., Any] = instance
    return called


def _needed(factory: Callable[..., Any]) -> list[str]:
    """Names of the arguments it can't be called without; nothing where that can't be told."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _wanted(option: str) -> str:
    return {"--data": "data", "--loss": "loss", "--optimizer": "optimizer"}.get(option, "model")


def _ended(error: SystemExit) -> str:
    return (
        f"ended the program (exit {error.code}); code that parses the command line or trains must stand under"
        " `if __name__ == '__main__':`, not where the model is made"
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
