"""What gradmon costs: one read of all gradients beside torch's clip, and whole training steps with it and without.

    python tests/bench/overhead.py [--seconds 470] [--only micro,one,ddp,gpt2,micro_gpu,gpu] [--threads 1]

Prints one Markdown document; progress goes to stderr. Nothing is asserted: bars are printed beside the numbers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Parts in the order they run, and how the time is shared out; the last one takes what the others leave.
WEIGHTS = {"micro": 30, "micro_gpu": 8, "one": 9, "gpu": 12, "ddp": 17, "gpt2": 40}
GPU_PARTS = {"micro_gpu", "gpu"}
RANKS = {"ddp": 2, "gpt2": 2}
#: Seconds that a part takes beyond those it is given: imports, the round that was begun.
_SLACK = 12
#: After a part that broke: others may be editing gradmon at this moment.
_RETRY_SECONDS = 15

MICRO_NOTE = """Milliseconds are medians over the rounds, ratios are medians of each round's ratio to its own
`clip_grad_norm_`. Gradients are random numbers with a norm above the clip's 1.0, written anew before each row."""
STEP_NOTE = """Blocks with and without gradmon alternate. Own work is timed inside gradmon's hooks on rank 0; a mean
weighs steps with full statistics by their cadence. The hook's multiplication and all-reduce replace DDP's own and are
counted to gradmon all the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=470, help="for everything (default: %(default)s)")
    parser.add_argument("--only", default="", help="parts to run, with commas between (default: all)")
    parser.add_argument("--threads", type=int, help="for the reads of all gradients (default: all cores)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        work(args.part, args.seconds, args.result, args.threads)
        return
    import torch

    parts = [p for p in WEIGHTS if torch.cuda.is_available() or p not in GPU_PARTS]
    only = set(filter(None, args.only.split(",")))
    if only - set(parts):
        parser.error(f"unknown parts {sorted(only - set(parts))}; here there are {', '.join(parts)}")
    parts = [p for p in parts if not only or p in only]
    end = time.monotonic() + args.seconds
    found: dict[str, Any] = {}
    for place, part in enumerate(parts):
        weight = WEIGHTS[part] / sum(WEIGHTS[p] for p in parts[place:])
        options = ["--threads", str(args.threads)] if args.threads else []
        found[part] = run(part, weight * (end - time.monotonic()), end, options)
    print("\n".join(document(found)))


def work(part: str, seconds: float, result_file: str, threads: int | None) -> None:
    """In a process of its own."""
    import micro
    import steps

    def save(result: dict[str, Any]) -> None:
        whole = Path(result_file + ".whole")
        whole.write_text(json.dumps(result))
        whole.replace(result_file)

    device = {"micro": "cpu", "micro_gpu": "cuda"}.get(part)
    if device:
        save(micro.run(device, seconds, threads))
    else:
        steps.worker(part, seconds, save)


def run(part: str, seconds: float, end: float, options: list[str]) -> dict[str, Any]:
    """A part's result, or {"failed": why}; tried again where there is time."""
    why = ""
    for attempt in range(3):
        if attempt:
            print(f"{part} failed, once more: {why}", file=sys.stderr, flush=True)
            time.sleep(_RETRY_SECONDS)
        left = end - time.monotonic()
        if left < 2 * _SLACK:
            break
        with tempfile.TemporaryDirectory() as folder:
            result, why = start(part, min(seconds, left) - _SLACK, left - _SLACK, Path(folder), options)
        if result is not None:
            return result
    return {"failed": why or "no time left"}


def start(
    part: str, seconds: float, limit: float, folder: Path, options: list[str]
) -> tuple[dict[str, Any] | None, str]:
    """Run one part in processes of its own; its result, or why there is none."""
    result_file = folder / "result.json"
    command = [sys.executable]
    environment = {**os.environ, "GRADMON_DIR": str(folder), "GRADMON_AGENT": "off"}
    if part in RANKS:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS[part])]
        environment["OMP_NUM_THREADS"] = "1"
    command += [__file__, "--part", part, "--seconds", str(max(1.0, seconds)), "--result", str(result_file), *options]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            follow(process, log, limit)
        finally:
            late = stop(process)
    if result_file.exists() and (late or process.returncode == 0):  # of one stopped in time: what it has so far
        return json.loads(result_file.read_text()), ""
    if late:
        return None, f"not one pair of blocks was done in {limit:.0f} s; give it more with --seconds"
    lines = log.read_text().splitlines()
    print(*lines[-40:], sep="\n", file=sys.stderr, flush=True)
    errors = [line for line in lines if re.search(r"\w(Error|Exception)\b", line) and "ChildFailed" not in line]
    return None, errors[0].strip() if errors else f"exit {process.returncode}"


def stop(process: subprocess.Popen[bytes]) -> bool:
    """End a process that was started here, if it still runs: torchrun ends its ranks when it is asked to end."""
    if process.poll() is not None:
        return False
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def follow(process: subprocess.Popen[bytes], log: Path, limit: float) -> None:
    """Pass progress on until the process ends, or the time is over."""
    end, seen = time.monotonic() + limit, 0
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.5)
        lines = log.read_text().splitlines()
        for line in lines[seen:]:
            if line.startswith(("micro,", "steps,", "not timed")):
                print(line, file=sys.stderr, flush=True)
        seen = len(lines)


def document(found: dict[str, Any]) -> list[str]:
    """Markdown of all parts."""
    import micro
    import steps

    lines = ["# What gradmon costs", "", machine(), ""]
    broken = {part: result["failed"] for part, result in found.items() if "failed" in result}
    found = {part: result for part, result in found.items() if part not in broken}
    for part, device in (("micro", "cpu"), ("micro_gpu", "cuda")):
        if part not in found:
            continue
        result = found[part]
        where = f"CPU, threads: {result['threads']}" if device == "cpu" else "GPU, CUDA events"
        counts = [
            f"{name}: {model['elements']:,} in {model['tensors']:,} tensors, {len(model['device']['clip'])} rounds"
            for name, model in result["models"].items()
        ]
        lines += [f"## All gradients once ({where})", "", "; ".join(counts) + f". {MICRO_NOTE}".replace("\n", " "), ""]
        lines += [*micro.table(result, device), "", *micro.memory_table(result), ""]
        if device == "cuda":
            lines += [*micro.cuda_table(result), ""]
    if not GPU_PARTS & (set(found) | set(broken)):
        lines += ["GPU: not measured, torch sees none here.", ""]
    stepped = [part for part in ("one", "ddp", "gpt2", "gpu") if part in found]
    if stepped:
        lines += ["## Whole steps (fused AdamW)", "", STEP_NOTE.replace("\n", " "), ""]
        bars = {found[part]["title"]: part for part in stepped}
        lines += [*steps.table([found[part] for part in stepped], bars), ""]
    return lines + [f"{part} was not measured: {why}" for part, why in broken.items()]


def machine() -> str:
    """Date, processor, cores, versions, GPU."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return (
        f"{datetime.date.today().isoformat()}; {_processor()}, {os.cpu_count()} cores; torch {torch.__version__}, "
        f"Python {platform.python_version()}; {gpu}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
