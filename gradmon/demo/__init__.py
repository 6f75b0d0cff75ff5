"""The demo: a real torchrun job, real faults, and what became of it.

This side runs in the terminal: it starts the agent and torchrun, and reads the journals afterwards. The training is in
`gradmon.demo.train`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import get_args

from gradmon import rules
from gradmon.agent.launch import agent_address, wait_for_agent
from gradmon.config import load
from gradmon.identity import choose_directory, page_hint
from gradmon.journal import read_journal
from gradmon.record import Event, LossReason
from gradmon.stack import ServerError, Stack, StackOptions


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What `gradmon demo` was asked for."""

    steps: int
    ranks: int
    seed: int
    guard: bool
    faults: bool
    port: int
    directory: str | None
    stay: bool
    """Keep the page up after the run, until Ctrl-C."""
    stack: bool = False
    """Run Prometheus, Alertmanager and Grafana with it."""
    webhook: str | None = None
    """Where the stack's alerts are to be sent too."""


def run_demo(options: DemoOptions) -> int:
    """Run it; the exit code is torchrun's."""
    directory = choose_directory(options.directory or load().config.dir, os.environ)
    if options.directory is None:
        directory = choose_directory(str(directory / "demo"), os.environ)  # never among the user's own runs
    agent = None
    servers = contextlib.ExitStack()
    # What was started must not outlive us.
    before = {number: signal.signal(number, _terminated) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        agent = _start_agent(directory, options)
        if options.stack:
            stack = servers.enter_context(_stack(directory, options))
            print(f"{stack.describe()}\n", flush=True)
        result = Path(tempfile.mkdtemp(prefix="gradmon-demo-")) / "result.json"
        code = _train(directory, options, result)
        if code == 0:
            _report(json.loads(result.read_text()), options)
        if options.stay:
            what = "The page and the servers stay" if options.stack else "The page stays"
            print(f"\n{what} up: {_address(directory)}   (Ctrl-C to end)", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        code = 130
    except ServerError as error:
        print(f"gradmon: {error}", file=sys.stderr)
        code = 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        servers.close()
        if agent is not None:
            agent.send_signal(signal.SIGINT)  # at once; after SIGTERM it would linger
            agent.wait(timeout=10)
    return code


class _Terminated(KeyboardInterrupt):
    """Ended by a signal that, unlike Ctrl-C, reached this process alone."""


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _stack(directory: Path, options: DemoOptions) -> Stack:
    return Stack(StackOptions(directory / "stack", follow=(directory,), webhook=options.webhook, settings=rules.DEMO))


def _start_agent(directory: Path, options: DemoOptions) -> subprocess.Popen[bytes] | None:
    """An agent of the demo's own, ended with it; None if one serves this directory already."""
    agent = None
    if agent_address(directory) is None:
        command = [sys.executable, "-m", "gradmon", "agent", "--dir", str(directory), "--port", str(options.port)]
        command += ["--linger", "600"]  # should the demo be killed
        with (directory / "agent.log").open("ab") as log:
            agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    if wait_for_agent(directory, timeout=30) is None:
        print(f"The agent did not start, see {directory / 'agent.log'}; training goes on without a page.")
    else:
        print(f"Live page: {_address(directory)}")
        print(f"Metrics:   {agent_address(directory)}/metrics\n", flush=True)
    return agent


def _address(directory: Path) -> str:
    return page_hint(agent_address(directory) or "(no agent)", os.environ)


def _train(directory: Path, options: DemoOptions, result: Path) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    command += ["-m", "gradmon.demo.train", "--steps", str(options.steps), "--seed", str(options.seed)]
    command += ["--dir", str(directory), "--result", str(result)]
    command += [] if options.guard else ["--no-guard"]
    command += [] if options.faults else ["--clean"]
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    environment = {
        **os.environ,
        # torchrun warns about a thread count that nobody chose, torch about a NumPy that nobody needs here
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONWARNINGS": "ignore:Failed to initialize NumPy:UserWarning",
    }
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt as error:
        if isinstance(error, _Terminated):
            process.terminate()
        process.wait()  # torchrun got the Ctrl-C too, and ends its workers
        raise
    if code == 0:
        print(f"\nTrained {options.steps} steps on {options.ranks} ranks in {time.monotonic() - started:.0f} s.")
    else:
        print(f"\ntorchrun ended with code {code}; the lines above say why.")
    return code


def _report(result: dict[str, object], options: DemoOptions) -> None:
    told = [event for _, event in read_journal(Path(str(result["journal"]))).events]
    events = [event for event in told if event.kind not in get_args(LossReason)]  # they repeat what gradients show
    print(event_table(events) if events else "Nothing happened: no step was touched.")
    loss = float(str(result["validation_loss"]))
    print(f"\nValidation loss: {loss:.3f}" + ("" if math.isfinite(loss) else "   <- the weights are NaN"))
    print(f"What happened, with charts and advice: gradmon report {Path(str(result['journal'])).parent.parent}")
    if options.guard:
        return
    if not math.isfinite(loss) or loss > float(str(result["first_loss"])) - 1.0:
        print("The run is ruined: nobody acted on what gradmon saw. Run it without --no-guard to see the difference.")
    else:
        print("gradmon only watched. Run it without --no-guard to see the difference.")


def event_table(events: list[Event]) -> str:
    """Events as a table for a terminal; steps in a row with the same story share a line."""
    rows = [("step", "rank", "parameter", "seen", "done")]
    stories = groupby(events, key=lambda e: (e.kind, e.action, e.rank))
    for (_, _, rank), group in stories:
        told = list(group)
        first, last = told[0], told[-1]
        steps = str(first.step) if first.step == last.step else f"{first.step}-{last.step} ({len(told)}x)"
        names = list(dict.fromkeys(e.parameter or "-" for e in told))
        parameter = names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
        seen, _, done = first.message.partition(": ")
        for told_already in (f", {first.parameter}", f" on rank {rank}"):
            seen = seen.removesuffix(told_already)
        rows.append((steps, "-" if rank is None else str(rank), parameter, seen, done))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
