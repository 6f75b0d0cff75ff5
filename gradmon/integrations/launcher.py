"""`gradmon run SCRIPT ARGS...`: the script as `python SCRIPT ARGS...` runs it, and gradmon attached to what it trains.

The script's module is `__main__`, and stays it to the end of the process: what it pickles, or starts by `spawn`, finds
its way back. An exception goes through to the interpreter, which does with it what it always does; only the frames of
gradmon are taken from its traceback. torch is not imported before the script does so, which may set variables first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import io
import logging
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from gradmon import config
from gradmon.log import logger

if TYPE_CHECKING:
    from gradmon.integrations.finder import Finder


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What `gradmon run` was asked for."""

    script: str
    arguments: Sequence[str] = ()
    module: bool = False
    """True if `script` names a module, as after `python -m`."""
    observe: bool = False
    """Only watch, whatever the settings say."""
    config: str | None = None
    """Path of a YAML file; None: GRADMON_CONFIG, or the defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `gradmon run`."""
    parser.add_argument("--observe", action="store_true", help="measure and report; change nothing")
    parser.add_argument("--gradmon-config", metavar="FILE", help="YAML file (default: GRADMON_CONFIG, or the defaults)")
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as after python -m")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(What is gradmon's, with the script; the script's own arguments). argparse would drop a `--` of the script's."""
    place = 0
    while place < len(argv) and argv[place].startswith("-"):
        place += 2 if argv[place] == "--gradmon-config" else 1
    return list(argv[: place + 1]), list(argv[place + 1 :])


def options_of(args: argparse.Namespace, arguments: Sequence[str]) -> RunOptions:
    """From what `add_arguments` has parsed, and the script's own arguments."""
    return RunOptions(args.script, arguments, args.module, args.observe, args.gradmon_config)


def prepare(options: RunOptions) -> Callable[[], None]:
    """Find the script and read the settings; nothing of it has run yet (but with `module` its parent packages).

    Returns:
        What runs it. All that the script raises, `SystemExit` included, goes through.

    Raises:
        ConfigError: a setting is no good.
        NoSuchScriptError: there is no such script or module.
    """
    settings = _settings(options)
    # Python 3.10 has no such flag.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = _first_on_path(options)
    sys.argv = [options.script, *options.arguments]
    execute = _module(options.script) if options.module else _script(options.script)

    def run() -> None:
        search = _Search(settings)
        search.start()
        _lead_children(options)
        try:
            execute()
        except SystemExit:
            search.farewell()
            raise
        except BaseException:
            _hide_our_frames()
            raise
        search.farewell()

    return run


def _settings(options: RunOptions) -> config.Config:
    settings = config.load(options.config).config
    return dataclasses.replace(settings, mode="observe") if options.observe else settings


class NoSuchScriptError(ValueError):
    """There is no such script or module."""


def _first_on_path(options: RunOptions) -> str:
    if options.module:
        return str(Path.cwd())
    path = Path(options.script).resolve()
    return str(path if path.is_dir() else path.parent)


def _script(name: str) -> Callable[[], Any]:
    path = Path(name)
    if path.is_dir() or path.suffix in (".zip", ".pyz"):
        return functools.partial(runpy.run_path, name, run_name="__main__")
    path = path.absolute()
    try:
        with io.open_code(str(path)) as file:
            source = file.read()
    except OSError as error:
        raise NoSuchScriptError(f"can't read the script {name}: {error.strerror or error}") from None
    loader = importlib.machinery.SourceFileLoader("__main__", str(path))

    def execute() -> None:
        code = compile(source, str(path), "exec", dont_inherit=True)
        _execute(code, __file__=str(path), __loader__=loader)

    return execute


def _module(name: str) -> Callable[[], Any]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        raise NoSuchScriptError(f"no module named {error.name}") from None
    get_code = getattr(spec and spec.loader, "get_code", None)
    if spec is None or get_code is None:
        raise NoSuchScriptError(f"no module named {name}, or none that can be run")

    def execute() -> None:
        sys.argv[0] = spec.origin or name
        _execute(
            get_code(spec.name),
            __file__=spec.origin,
            __loader__=spec.loader,
            __spec__=spec,
            __package__=spec.parent,
            __cached__=spec.cached,
        )

    return execute


def _execute(code: CodeType, **attributes: Any) -> None:
    module = ModuleType("__main__")
    vars(module).update({"__builtins__": sys.modules["builtins"], **attributes})
    ours, sys.modules["__main__"] = sys.modules["__main__"], module
    exec(code, vars(module))  # noqa: S102
    del ours  # the module whose code is running has lived until here


def _hide_our_frames() -> None:
    """The interpreter is about to tell of an exception: in its traceback the script comes first."""
    hook = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = hook
        hook(kind, error.with_traceback(_from_script(trace)), error.__traceback__)

    sys.excepthook = told


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """Without the frames up to this module's, these, and those of runpy that follow."""
    while trace is not None and trace.tb_frame.f_code.co_filename != __file__:
        trace = trace.tb_next
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        trace = trace.tb_next
    return trace


_led: list[bool] = []
"""Not empty once a process was started that looks for what it trains."""


def _lead_children(options: RunOptions) -> None:
    """Processes started by `spawn` (`torch.multiprocessing.spawn` trains in them) are looked into as well."""
    original = spawn.get_command_line
    arguments = repr((options.observe, options.config and str(Path(options.config).absolute())))

    @functools.wraps(original)
    def with_gradmon(**keywords: Any) -> list[str]:
        command = original(**keywords)
        if "-c" in command:
            place = command.index("-c") + 1
            ours = f"try:\n from {__name__} import follow\n follow{arguments}\nexcept Exception: pass\n"
            command[place] = ours + command[place]
            _led.append(True)
        return command

    spawn.get_command_line = with_gradmon


def follow(observe: bool, path: str | None) -> None:
    """In a process that the script has started: look for what it trains, too."""
    options = RunOptions("", observe=observe, config=path)
    _Search(_settings(options)).start()
    _lead_children(options)


class _Search:
    """Waits for the script to import torch; then a `Finder` looks for what it trains."""

    def __init__(self, settings: config.Config) -> None:
        self._settings = settings
        self._finder: Finder | None = None
        self._broken = False

    def start(self) -> None:
        if "torch" in sys.modules:
            self._begin()
        else:
            sys.meta_path.insert(0, _AfterImport("torch", self._begin))

    def _begin(self) -> None:
        try:
            from gradmon.integrations.finder import Finder

            self._finder = Finder(self._settings, _say)
            self._finder.start()
            if "torch._dynamo" in sys.modules:
                self._finder.compiler_came()
            else:
                sys.meta_path.insert(0, _AfterImport("torch._dynamo", self._finder.compiler_came))
        except Exception as error:
            self._broken = True
            _say(f"can't look into this torch: {type(error).__name__}: {error}. The script goes on without gradmon")

    def farewell(self) -> None:
        """The script has come to its end: if nothing was watched, say why."""
        if self._broken or _led or (self._finder is not None and self._finder.attached):
            return
        why = "the script never imported torch in this process"
        if self._finder is not None:
            why = "the script never stepped an optimizer in this process"
            if self._finder.stepped:
                why = "no model was found that the script's optimizers train"
        if os.environ.get("RANK", "0") == "0":
            _say(
                f"nothing was watched: {why}. Forked processes that train are not seen: call "
                f"gradmon.attach(model, optimizer) there, or start the ranks with torchrun"
            )


def _say(message: str) -> None:
    """Where the script's logging goes, or to stderr; a filter of the script's that raises must not end it."""
    with contextlib.suppress(Exception):
        if logger.hasHandlers():
            logger.log(logging.WARNING, "%s", message)
        else:
            print(f"gradmon: {message}", file=sys.stderr)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then` right after a module was imported for the first time."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name = name
        self._then = then
        self._asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """What the other finders find, with its loader made to call `then`; it may be asked for and not imported."""
        if fullname != self._name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            @functools.wraps(execute)
            def and_then(module: ModuleType) -> None:
                del loader.exec_module
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._then()

            with contextlib.suppress(AttributeError):  # a loader that lets nothing be set: then nothing is watched
                loader.exec_module = and_then
        return spec
