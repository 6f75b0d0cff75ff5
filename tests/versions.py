"""gradmon with the oldest torch it takes, and with the newest of everything: a virtual environment for each.

    python tests/versions.py [--only oldest,newest] [--folder KEEP] [--write FILE]

Needs a network that pip can reach, 10 GB of disk and up to an hour: no part of `make test`. Where packages come from is
pip's own setting; on Linux its torch usually is the CUDA build, which runs without a GPU, too. Progress goes to stderr,
the result to tests/bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "bench" / "results"
#: What meets torch's own parts (hooks, DDP, FSDP2, optimizers, the compiler), and `gradmon run`, which wraps some.
_PARTS = "attach ddp hooks loops optimizers precision raw_loops sharding snapshot stats"
CORE = ("tests/launcher", *(f"tests/training/test_{name}.py" for name in _PARTS.split()))
SHOWN = ("torch", "transformers", "accelerate", "lightning", "trl", "deepspeed")
#: Longest that one row's tests may take. The CUDA build of torch takes seconds to import, in hundreds of processes.
MINUTES = 60


@dataclass(frozen=True)
class Row:
    """A set of versions, and what is to work with them."""

    name: str
    what: str
    wanted: tuple[str, ...]
    """What pip is asked for beside gradmon's own needs; a name alone is its newest version."""
    tests: tuple[str, ...]
    """Empty: pip only has to find versions that fit together."""
    extras: str = "test"
    built: str = ""
    """Asked for afterwards: what is built with the torch that is there."""


ROWS = (
    Row("oldest", "the oldest torch", ("torch==2.6.0",), CORE),
    Row("newest", "the newest torch", ("torch",), CORE),
    Row(
        "trainers", "the newest transformers, accelerate, lightning, trl",
        ("transformers", "accelerate", "lightning", "trl"), ("tests/integrations",),
    ),
    Row("deepspeed", "DeepSpeed, its engine on CPU", (), ("tests/training/test_raw_loops.py",), built="deepspeed"),
    Row("extras", "all extras together", (), (), "explain,huggingface,lightning,tensorboard,wandb,test"),
)  # fmt: skip


@dataclass
class Outcome:
    """What came of a row."""

    row: Row
    tests: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    python: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """Failed tests, each with the last line of its error."""
    problem: str = ""
    """Why there are no tests to count."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problem and not self.broken


def main() -> None:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"rows, with commas between: {', '.join(names)} (default: all)")
    parser.add_argument("--folder", type=Path, help="where environments are kept (default: removed after their row)")
    parser.add_argument("--write", type=Path, help="file for the result (default: a dated one in tests/bench/results)")
    parser.add_argument("--tests", nargs="+", help="run these in place of each row's own")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    if only - set(names):
        parser.error(f"unknown rows {sorted(only - set(names))}; there are {', '.join(names)}")
    outcomes = []
    for row in ROWS:
        if not only or row.name in only:
            outcomes.append(run(row, args.folder, tuple(args.tests) if args.tests and row.tests else row.tests))
            say(row, told(outcomes[-1]))
    file = args.write or RESULTS / f"{datetime.date.today().isoformat()}-versions.md"
    text = "\n".join(document(outcomes)) + "\n"
    file.write_text(text, encoding="utf-8")
    print(text)
    say(None, f"written to {file}")
    sys.exit(not all(outcome.ok for outcome in outcomes))


def say(row: Row | None, message: str) -> None:
    print(f"versions{'' if row is None else f' [{row.name}]'}: {message}", file=sys.stderr, flush=True)


def run(row: Row, folder: Path | None, tests: tuple[str, ...]) -> Outcome:
    """One row from nothing to its counts; never raises for what the row itself has broken."""
    outcome, start = Outcome(row, tests), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gradmon-versions-") as temporary:
        home = (folder or Path(temporary)).absolute() / row.name
        try:
            if tests:
                install(row, home)
                outcome.versions, outcome.python = versions_in(home)
                say(row, f"installed: {shown(outcome.versions)}; {' '.join(tests)}")
                run_tests(outcome, home)
            else:
                resolve(outcome, home)
        except subprocess.CalledProcessError as error:
            outcome.problem = last_line(error.stdout) or f"exit status {error.returncode}"
        except subprocess.TimeoutExpired:
            outcome.problem = f"did not end within {MINUTES} minutes"
    outcome.seconds = time.monotonic() - start
    return outcome


def call(command: Sequence[str | Path]) -> str:
    """Standard output and error of a command that must succeed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRADMON_", "TORCHELASTIC_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=MINUTES * 60,
    )  # fmt: skip
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, list(command), done.stdout)
    return done.stdout


def make(home: Path) -> Path:
    """The interpreter of an environment that is there now."""
    python = home / "bin" / "python"
    if not python.exists():
        call([sys.executable, "-m", "venv", home])
    return python


def install(row: Row, home: Path) -> None:
    say(row, f"installing {row.what} into {home}")
    call([make(home), "-m", "pip", "install", "-q", "--upgrade", "-e", f".[{row.extras}]", *row.wanted])
    if row.built:
        call([make(home), "-m", "pip", "install", "-q", "setuptools", "wheel"])
        call([make(home), "-m", "pip", "install", "-q", "--no-build-isolation", row.built])


def versions_in(home: Path) -> tuple[dict[str, str], str]:
    """Versions of what is shown, by name, and Python's."""
    look = (
        "import importlib.metadata, json, platform\n"
        "found = {d.metadata['Name'].lower(): d.version for d in importlib.metadata.distributions()}\n"
        "print(json.dumps([found, platform.python_version()]))"
    )
    found, python = json.loads(call([home / "bin" / "python", "-c", look]))
    return {name: found[name] for name in SHOWN if name in found}, python


def run_tests(outcome: Outcome, home: Path) -> None:
    """Run pytest there and read its report; fails only where pytest itself could not run."""
    report = home / "report.xml"
    report.unlink(missing_ok=True)
    command = [
        home / "bin" / "python",
        "-m",
        "pytest",
        "-q",
        "--timeout",
        "400",
        f"--junitxml={report}",
        *outcome.tests,
    ]
    output = ""
    try:
        output = call(command)
    except subprocess.CalledProcessError as error:
        output = error.stdout
        if error.returncode != 1 or not report.exists():  # 1: tests failed
            raise
    (home / "output.txt").write_text(output, encoding="utf-8")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        outcome.problem = "pytest has written no report"
        return
    found = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    outcome.counts = {
        "passed": found["tests"] - found["failures"] - found["errors"] - found["skipped"],
        "failed": found["failures"] + found["errors"],
        "skipped": found["skipped"],
    }
    for case in suite.iter("testcase"):
        for kind in (*case.findall("failure"), *case.findall("error")):
            reason = (kind.get("message") or "").splitlines() or [""]
            outcome.broken.append(f"`{case.get('classname')}::{case.get('name')}`: {reason[0][:160]}")


def resolve(outcome: Outcome, home: Path) -> None:
    """Let pip find versions of everything that fit together; nothing is installed."""
    say(outcome.row, "asking pip for versions that fit together")
    report = call([make(home), "-m", "pip", "install", "-q", "--dry-run", "--report", "-", f".[{outcome.row.extras}]"])
    found = json.loads(report[report.index("{") : report.rindex("}") + 1])
    chosen = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in found["install"]}
    outcome.versions = {name: chosen[name] for name in SHOWN if name in chosen}
    outcome.python = platform.python_version()
    outcome.counts = {"packages": len(chosen)}


def last_line(text: str | None) -> str:
    lines = [line for line in (text or "").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR")]
    return (told or lines or [""])[-1].strip()[:200]


def shown(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)


def told(outcome: Outcome) -> str:
    counts = ", ".join(f"{number} {what}" for what, number in outcome.counts.items())
    return f"{'ok' if outcome.ok else 'FAILED'} after {outcome.seconds / 60:.0f} min: {outcome.problem or counts}"


def document(outcomes: Sequence[Outcome]) -> list[str]:
    """The dated result, as Markdown."""
    lines = [
        "# Versions",
        "",
        f"`python tests/versions.py`; {datetime.date.today().isoformat()}; {processor()}, {os.cpu_count()} cores; "
        f"{platform.system()}; no GPU is used. Each row has a virtual environment of its own. "
        "Words alone are files of tests/training.",
        "",
        "| what | " + " | ".join(SHOWN) + " | Python | tests | outcome | minutes |",
        "|---|" + "---|" * len(SHOWN) + "---|---|---|---:|",
    ]
    for outcome in outcomes:
        versions = " | ".join(outcome.versions.get(name, "") for name in SHOWN)
        tests = " ".join(outcome.tests).replace("tests/training/test_", "").replace(".py", "") or "they fit together"
        counts = ", ".join(f"{number} {what}" for what, number in outcome.counts.items())
        lines.append(
            f"| {outcome.row.what} | {versions} | {outcome.python} | {tests} | {outcome.problem or counts} "
            f"| {outcome.seconds / 60:.0f} |"
        )
    for outcome in outcomes:
        if outcome.broken:
            lines += ["", f"## Failed with {outcome.row.what}", "", *(f"- {test}" for test in outcome.broken)]
    return lines


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
