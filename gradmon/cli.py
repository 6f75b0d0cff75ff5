"""The command line. Nothing here imports torch before a command needs it: the agent runs where there is none."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from gradmon import __version__
from gradmon.integrations import launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:  # what the script raises is its own
        ours, arguments = launcher.split(argv[1:])
        return _run(_parser("run").parse_args(["run", *ours]), arguments)
    args = _parser(argv[0] if argv else "").parse_args(argv)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
    except ValueError as error:  # ConfigError, DirectoryError: the user's mistake, in a sentence
        print(f"gradmon: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has enough of it, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


#: Commands that explain, each a module with `add_arguments` and `run`, imported only when it is asked for.
_EXPLAIN = {
    "report": ("gradmon.diagnose.report", "what happened in a run: one HTML file from the journals of all ranks"),
    "compare": ("gradmon.diagnose.compare", "two runs side by side: settings, losses, incidents, where they part"),
    "replay": ("gradmon.diagnose.replay", "run an incident's batch again and name the operation that broke"),
    "doctor": ("gradmon.diagnose.doctor.command", "audit a model, its first batch and its optimizer before the run"),
}


def _parser(chosen: str) -> argparse.ArgumentParser:
    """With the arguments of the `chosen` command, where those are another module's."""
    parser = argparse.ArgumentParser(
        prog="gradmon", description="Keeps multi-GPU PyTorch training healthy, and says so to Prometheus."
    )
    parser.add_argument("--version", action="version", version=f"gradmon {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="watch a real two-rank training run survive an explosion")
    _add_demo_options(demo)
    demo.set_defaults(command=_demo)

    run = commands.add_parser("run", help="run a training script, unchanged, and guard what it trains")
    launcher.add_arguments(run)

    agent = commands.add_parser("agent", help="serve /metrics and the live page for the runs of this node")
    agent.add_argument("--dir", help="directory of the journals (default: where attach() puts them)")
    agent.add_argument("--listen", help="address to listen on (default: agent.listen, 127.0.0.1)")
    agent.add_argument("--port", type=_whole(0, 65535), help="first port to try (default: agent.port, 10855)")
    _add_agent_options(agent)
    agent.set_defaults(command=_agent)

    stack = commands.add_parser("stack", help="run Prometheus, Alertmanager and Grafana here, without Docker")
    _add_stack_options(stack)
    stack.set_defaults(command=_stack)

    for name, (module, what) in _EXPLAIN.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name == chosen:
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # by torch
            found = importlib.import_module(module)
            found.add_arguments(command)
            command.set_defaults(command=found.run)

    config = commands.add_parser("config", help="print the settings in force, and where each comes from")
    config.add_argument("file", nargs="?", metavar="FILE", help="YAML file (default: GRADMON_CONFIG, if set)")
    config.set_defaults(command=_config)
    return parser


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--steps", type=_whole(40, 100_000), default=800, help="optimizer steps (default: %(default)s)")
    demo.add_argument("--ranks", type=_whole(1, 64), default=2, help="processes (default: %(default)s)")
    demo.add_argument("--seed", type=_whole(0, 2**31 - 1), default=0, help="(default: %(default)s)")
    demo.add_argument("--no-guard", action="store_true", help="same faults, gradmon only watching: the run is ruined")
    demo.add_argument("--clean", action="store_true", help="no faults")
    demo.add_argument("--port", type=_whole(0, 65535), default=10855, help="first port to try (default: %(default)s)")
    demo.add_argument("--dir", help="directory of the journals (default: `demo` in gradmon's own)")
    demo.add_argument(
        "--stack", action="store_true", help="with Prometheus, Alertmanager and Grafana; prints the alerts"
    )
    demo.add_argument("--webhook", metavar="URL", help="with --stack: send the alerts there too")
    demo.add_argument("--stay", action="store_true", help="keep the page up after the run (default on a terminal)")
    demo.add_argument(
        "--exit", action="store_true", help="end after the run (default unless on a terminal: the page stays up)"
    )


def _add_agent_options(agent: argparse.ArgumentParser) -> None:
    agent.add_argument(
        "--linger",
        type=_seconds,
        metavar="SECONDS",
        help="serve on so long after the last rank has gone, and after SIGTERM (default: forever, and 0)",
    )
    for name, what in {
        "token-file": "ask for a bearer token out of this file, one per line",
        "basic-auth-file": "ask for a user:password out of this file, one per line; works in browsers",
        "tls-cert": "serve HTTPS with this certificate (PEM, with its chain)",
        "tls-key": "its key (PEM; default: in the certificate's file)",
        "sd-dir": "write a file_sd file for Prometheus into this directory, removed on a clean exit",
        "archive": "copy journals to this directory on an incident and at their end",
    }.items():
        setting = "archive" if name == "archive" else f"agent.{name.replace('-', '_')}"
        agent.add_argument(f"--{name}", metavar="PATH", help=f"{what} (default: {setting})")
    agent.add_argument("--spawned", action="store_true", help=argparse.SUPPRESS)


def _add_stack_options(stack: argparse.ArgumentParser) -> None:
    stack.add_argument("--dir", help="for configuration, data and logs (default: `stack` in gradmon's own)")
    stack.add_argument(
        "--journals",
        action="append",
        metavar="DIR",
        help="follow the agent that serves these journals; may be repeated (default: where attach() puts them)",
    )
    stack.add_argument(
        "--target", action="append", default=[], metavar="HOST:PORT", help="a further agent; may be repeated"
    )
    stack.add_argument("--webhook", metavar="URL", help="send the alerts there too; they are printed here")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high} (got {text!r})")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0 up (got {text!r})")
    return value


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    try:
        execute = launcher.prepare(launcher.options_of(args, arguments))
    except ValueError as error:
        print(f"gradmon: {error}", file=sys.stderr)
        return 2
    execute()
    return 0


def _demo(args: argparse.Namespace) -> int:
    from gradmon.demo import DemoOptions, run_demo

    return run_demo(
        DemoOptions(
            steps=args.steps,
            ranks=args.ranks,
            seed=args.seed,
            guard=not args.no_guard,
            faults=not args.clean,
            port=args.port,
            directory=args.dir,
            stay=(args.stay or sys.stdout.isatty()) and not args.exit,
            stack=args.stack,
            webhook=args.webhook,
        )
    )


def _agent(args: argparse.Namespace) -> int:
    from gradmon.agent import AgentOptions, run_agent
    from gradmon.config import load
    from gradmon.identity import agent_directory

    settings = load().config
    directory = agent_directory(args.dir or settings.dir, os.environ)
    options = AgentOptions(
        listen=args.listen or settings.agent.listen,
        port=settings.agent.port if args.port is None else args.port,
        linger_seconds=args.linger,
        token_file=args.token_file or settings.agent.token_file,
        basic_auth_file=args.basic_auth_file or settings.agent.basic_auth_file,
        tls_cert=args.tls_cert or settings.agent.tls_cert,
        tls_key=args.tls_key or settings.agent.tls_key,
        sd_dir=args.sd_dir or settings.agent.sd_dir,
        archive=args.archive or settings.archive,
        spawned=args.spawned,
    )
    return run_agent(Path(directory), options)


def _stack(args: argparse.Namespace) -> int:
    from gradmon.config import load
    from gradmon.identity import agent_directory
    from gradmon.stack import StackOptions, run_stack

    journals = agent_directory(load().config.dir, os.environ)
    directory = Path(args.dir).absolute() if args.dir else agent_directory(str(journals / "stack"), os.environ)
    follow = tuple(map(Path, args.journals or [journals]))
    return run_stack(StackOptions(directory, follow=follow, targets=tuple(args.target), webhook=args.webhook))


def _config(args: argparse.Namespace) -> int:
    from gradmon.config import describe, load

    print(describe(load(args.file)), end="")
    return 0
