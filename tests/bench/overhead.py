"""What the attached monitor adds to a training step: the demo's model on 2 gloo ranks, with and without, side by side.

    python tests/bench/overhead.py [--repeats 12] [--steps 25]

Blocks of steps with gradmon and without alternate in one process, so that a machine that slows down slows both. The
ratio of each pair of neighbouring blocks is taken, and the median of those ratios. Beside it the time that gradmon's
own code takes on the training thread, measured inside its hooks, and what putting a step into the journal costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 10


def block(
    model: Any, optimizer: Any, draw: Callable[[], Any], loss_of: Callable[..., Any], steps: int, monitor: Any
) -> float:
    """Seconds per step, the slowest rank counts."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        inputs, targets = draw()
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.observe(loss=loss)
    took = torch.tensor((time.perf_counter() - started) / steps)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


class OwnTime:
    """Times gradmon's entry points from outside."""

    def __init__(self, monitor_module: Any, local_module: Any, journal_module: Any) -> None:
        self.seconds: dict[str, list[float]] = {"hooks": [], "put": []}
        for owner, name, key in (
            (monitor_module.Monitor, "_before_step", "hooks"),
            (monitor_module.Monitor, "_after_step", "hooks"),
            (monitor_module.Monitor, "observe", "hooks"),
            (local_module.LocalHook, "_measure", "hooks"),
            (local_module.LocalHook, "_share", "hooks"),
            (journal_module.JournalWriter, "put", "put"),
        ):
            self._wrap(owner, name, self.seconds[key])

    @staticmethod
    def _wrap(owner: Any, name: str, into: list[float]) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                into.append(time.perf_counter() - started)

        setattr(owner, name, timed)


def worker(args: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import gradmon
    from gradmon import journal, local, monitor
    from gradmon.demo import train

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    text, _ = train.load_text()
    model = DistributedDataParallel(train.Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    own = OwnTime(monitor, local, journal)

    def run(attached: bool, steps: int) -> float:
        watching = gradmon.attach(model, optimizer) if attached else None
        # the first block leaves DDP's hook behind; detached it passes gradients through, as without gradmon
        took = block(model, optimizer, lambda: train.draw(text, generator), train.loss_of, steps, watching)
        if watching is not None:
            watching.detach()
        return took

    plain = [block(model, optimizer, lambda: train.draw(text, generator), train.loss_of, WARM_UP, None)]
    plain = [
        block(model, optimizer, lambda: train.draw(text, generator), train.loss_of, args.steps, None) for _ in range(3)
    ]
    run(True, WARM_UP)
    for times in own.seconds.values():
        times.clear()
    pairs = [(run(False, args.steps), run(True, args.steps)) for _ in range(args.repeats)]
    if dist.get_rank() == 0:
        count = args.repeats * args.steps
        result = {
            "without": statistics.median(a for a, _ in pairs),
            "with": statistics.median(b for _, b in pairs),
            "before_any_hook": statistics.median(plain),
            "ratios": sorted(b / a for a, b in pairs),
            "own_seconds": sum(own.seconds["hooks"]) / count,
            "put_median": statistics.median(own.seconds["put"]),
            "put_p99": sorted(own.seconds["put"])[int(0.99 * len(own.seconds["put"]))],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        Path(args.result).write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    """Start torchrun on this file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12, help="pairs of blocks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="steps in a block (default: %(default)s)")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["--repeats", str(args.repeats), "--steps", str(args.steps), "--result", str(result_file)]
        environment = {**os.environ, "GRADMON_DIR": folder, "GRADMON_AGENT": "off", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
        print(table(json.loads(result_file.read_text())))


def table(result: dict[str, Any]) -> str:
    """Markdown, with the machine named."""
    import torch

    ratios = result["ratios"]
    quarter = len(ratios) // 4
    rows = [
        ("step without gradmon, median", f"{1e3 * result['without']:.2f} ms"),
        ("step with gradmon, median", f"{1e3 * result['with']:.2f} ms"),
        ("ratio, median of pairs", f"{statistics.median(ratios):.4f}"),
        ("ratio, middle half of pairs", f"{ratios[quarter]:.4f} to {ratios[-1 - quarter]:.4f}"),
        ("gradmon's own code on the training thread", f"{1e6 * result['own_seconds']:.0f} us per step"),
        ("... as a share of the step", f"{100 * result['own_seconds'] / result['without']:.2f} %"),
        (
            "handing a step to the journal, median / p99",
            f"{1e6 * result['put_median']:.1f} / {1e6 * result['put_p99']:.1f} us",
        ),
    ]
    machine = f"{os.cpu_count()} CPUs ({_processor()}), torch {torch.__version__}, Python {platform.python_version()}"
    job = f"demo model ({result['parameters']:,} parameters), fused AdamW, DDP on 2 gloo ranks with 1 thread each"
    lines = [f"{job}; {machine}", "", "| what | measured |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)]
    return "\n".join(lines)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
