"""The command line. Nothing here imports torch before a command needs it: the agent runs where there is none."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gradmon import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        code: int = args.command(args)
    except ValueError as error:  # ConfigError, DirectoryError: the user's mistake, in a sentence
        print(f"gradmon: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradmon", description="Keeps multi-GPU PyTorch training healthy, and says so to Prometheus."
    )
    parser.add_argument("--version", action="version", version=f"gradmon {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="watch a real two-rank training run survive an explosion")
    _add_demo_options(demo)
    demo.set_defaults(command=_demo)

    agent = commands.add_parser("agent", help="serve /metrics and the live page for the runs of this node")
    agent.add_argument("--dir", help="directory of the journals (default: where attach() puts them)")
    agent.add_argument("--listen", help="address to listen on (default: agent.listen, 127.0.0.1)")
    agent.add_argument("--port", type=_whole(0, 65535), help="first port to try (default: agent.port, 10855)")
    agent.add_argument(
        "--linger", type=_seconds, metavar="SECONDS", help="end so long after the last rank (default: serve forever)"
    )
    agent.add_argument("--spawned", action="store_true", help=argparse.SUPPRESS)
    agent.set_defaults(command=_agent)

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
        "--exit", action="store_true", help="end after the run (default unless on a terminal: the page stays up)"
    )


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
            stay=sys.stdout.isatty() and not args.exit,
        )
    )


def _agent(args: argparse.Namespace) -> int:
    from gradmon.agent import run_agent
    from gradmon.config import load
    from gradmon.identity import choose_directory

    settings = load().config
    directory = choose_directory(args.dir or settings.dir, os.environ)
    return run_agent(
        Path(directory),
        listen=args.listen or settings.agent.listen,
        port=settings.agent.port if args.port is None else args.port,
        linger_seconds=args.linger,
        spawned=args.spawned,
    )


def _config(args: argparse.Namespace) -> int:
    from gradmon.config import describe, load

    print(describe(load(args.file)), end="")
    return 0
