"""What stands around the package: make's .venv, CI, the agent's image, the files that are shipped.

The shell scripts run for real, in a copy of the few files they read. Interpreters are fakes: a `python3` whose torch is
a stub, and whose `venv` makes a folder with a `python` that writes down how pip was called. Nothing is fetched.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(body))
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of what make reads, and a fake interpreter to give it as PYTHON=."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.root.mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        self.calls = folder / "calls"
        self.calls.write_text("")
        self.modules = folder / "modules"
        self.modules.mkdir()
        # -S: no site-packages, so that the stub is the only torch there can be.
        self.python = script(
            folder / "python3",
            f"""
            if [ "$1 $2" = "-m venv" ]; then
                echo "$*" >> {self.calls}
                mkdir -p .venv/bin .venv/lib/python3/site-packages && cp {folder}/venv-python .venv/bin/python
                [[ "$*" != *--system-site-packages* ]] || touch .venv/sees-the-system
                if [ -e {folder}/venv-hangs ]; then touch {folder}/began; sleep 30; fi
                exit
            fi
            PYTHONPATH={self.modules} exec {sys.executable} -S "$@"
            """,
        )
        script(
            folder / "venv-python",
            f"""
            case "$*" in
                "-m pip install"*)
                    echo "$*" >> {self.calls}
                    cat "$(grep -o '[^ ]*constraints.txt' <<< "$*")" > {folder}/constraints
                    if [ -e {folder}/pip-hangs ]; then touch {folder}/began; sleep 30; fi
                    if [ -e {folder}/pip-fails ]; then exit 1; fi ;;
                "-m pip --version" | "-c pass") ;;
                "-c "*sysconfig*) echo .venv/lib/python3/site-packages ;;
                *) [ ! -e .venv/sees-the-system ] || PYTHONPATH={self.modules} exec {sys.executable} -S "$@"
                   exec {sys.executable} -S "$@" ;;
            esac
            """,
        )
        # MAKEFLAGS and ARGS of the make that started pytest must not reach the one under test.
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": str(self.python)}

    def torch(self, version: str, body: str = "") -> None:
        (self.modules / "torch").mkdir()
        (self.modules / "torch" / "__init__.py").write_text(body)
        info = self.modules / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def bootstrap(self, group: str = "core") -> subprocess.CompletedProcess[str]:
        return self.run(".ci/bootstrap", group)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.root, env=self.env, text=True, capture_output=True, timeout=60)

    def take_calls(self) -> list[str]:
        lines = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return lines

    @property
    def constraints(self) -> list[str]:
        text = (self.calls.parent / "constraints").read_text()
        return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# --- what this machine lacks: one line with the cure, exit 2 ---------------------------------------------------------


@pytest.mark.parametrize("target", ["demo", "test"])
def test_without_ensurepip_make_names_the_cure(checkout: Checkout, target: str) -> None:
    (checkout.modules / "ensurepip.py").write_text("raise ImportError('Debian ships this in python3-venv')")
    done = checkout.run("make", target)
    assert done.returncode == 2
    ours = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    assert ours == [f"gradmon: {checkout.python} can't make a virtual environment; cure: sudo apt install python3-venv"]
    assert not (checkout.root / ".venv").exists()


def test_an_old_python_is_named_with_the_one_that_is_needed(checkout: Checkout) -> None:
    script(
        checkout.python,
        f"""
        [ "$1" != -V ] || {{ echo "Python 3.9.2"; exit; }}
        [ "$1" != -c ] || exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); $2" "${{@:3}}"
        exit 99
        """,
    )
    done = checkout.bootstrap()
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"gradmon: needs Python 3\.10 or newer, and .* is Python 3\.9\.2; cure: .*\n", done.stderr)
    assert not (checkout.root / ".venv").exists()


def test_no_python_at_all(checkout: Checkout) -> None:
    checkout.env["PYTHON"] = "/nowhere/python3"
    done = checkout.bootstrap()
    assert done.returncode == 2
    assert done.stderr == "gradmon: no /nowhere/python3 here; cure: sudo apt install python3 python3-venv\n"


# --- which torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.6.0", "2.6.0+cu124", "2.10.1", "2.7.0a0+7c8ec84dab.nv25.3", "3.0.0"])
def test_an_installed_torch_is_seen_and_kept(checkout: Checkout, version: str) -> None:
    checkout.torch(version)
    done = checkout.bootstrap()
    assert done.returncode == 0, done.stderr
    assert f"its torch {version}" in done.stdout
    assert "fetches" not in done.stdout
    assert checkout.take_calls()[0] == "-m venv --system-site-packages .venv"
    assert checkout.constraints == [f"torch=={version}"]


@pytest.mark.parametrize(
    ("version", "body"),
    [
        pytest.param("2.5.1", "", id="too old"),
        pytest.param("1.13.1", "", id="much too old"),
        pytest.param("2.6.0a0+df5bbc09d1.nv24.12", "", id="pip counts it as older than 2.6"),
        pytest.param("2.9.0", "raise ImportError('libcudart.so.13')", id="broken"),
        pytest.param(None, "", id="none"),
    ],
)
def test_without_one_the_constraints_decide_and_the_size_is_said_first(
    checkout: Checkout, version: str | None, body: str
) -> None:
    if version:
        checkout.torch(version, body)
    done = checkout.bootstrap()
    assert done.returncode == 0, done.stderr
    assert checkout.take_calls()[0] == "-m venv .venv"
    pins = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    assert checkout.constraints == [line for line in pins if not line.startswith("#")]
    lines = done.stdout.splitlines()
    size = next(i for i, line in enumerate(lines) if "several GB" in line and "PYTHON=" in line)
    assert size < next(i for i, line in enumerate(lines) if "installing" in line)


def test_torch_in_an_outer_virtual_environment_is_linked(checkout: Checkout) -> None:
    checkout.torch("2.8.0")
    # What a virtual environment made out of another one looks like: its system is the base, which has no torch.
    python = checkout.python.read_text().replace("touch .venv/sees-the-system", "true")
    assert python != checkout.python.read_text()
    checkout.python.write_text(python)
    assert checkout.bootstrap().returncode == 0
    link = checkout.root / ".venv/lib/python3/site-packages/outer-torch.pth"
    assert link.read_text() == f"{checkout.modules.resolve()}\n"


def test_the_constraint_is_one_that_pyproject_accepts() -> None:
    pin = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / ".ci/constraints.txt").read_text(), re.MULTILINE)
    least = re.search(r"^ *\"torch>=(\d+)\.(\d+)\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert pin
    assert least
    assert [int(n) for n in pin.groups()] >= [int(n) for n in least.groups()]


# --- stamps, repairs --------------------------------------------------------------------------------------------------


def test_each_group_is_installed_once_and_core_comes_with_any(checkout: Checkout) -> None:
    assert checkout.bootstrap("core").returncode == 0
    calls = checkout.take_calls()
    assert calls[0] == "-m venv .venv"
    assert calls[1].endswith("-e .")
    assert len(calls) == 2
    assert checkout.bootstrap("core").stdout == ""
    assert checkout.take_calls() == []
    checkout.bootstrap("test")
    (call,) = checkout.take_calls()
    assert call.endswith("-e .[test]")
    (checkout.root / ".venv/.gradmon/core").unlink()
    checkout.bootstrap("lint")
    checkout.take_calls()
    checkout.bootstrap("core")
    assert checkout.take_calls() == []


@pytest.mark.parametrize("name", ["pyproject.toml", ".ci/constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(checkout: Checkout, name: str) -> None:
    checkout.bootstrap()
    checkout.take_calls()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.bootstrap()
    (call,) = checkout.take_calls()
    assert call.startswith("-m pip install")


@pytest.mark.parametrize(("hangs", "group"), [("venv", "core"), ("pip", "core"), ("pip", "test")])
def test_an_interrupted_install_is_repaired_by_the_next_call(
    checkout: Checkout, tmp_path: Path, hangs: str, group: str
) -> None:
    if group != "core":
        checkout.bootstrap("core")
    (tmp_path / f"{hangs}-hangs").touch()
    process = subprocess.Popen([".ci/bootstrap", group], cwd=checkout.root, env=checkout.env, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / f"{hangs}-hangs").unlink()
    checkout.take_calls()
    done = checkout.bootstrap(group)
    assert done.returncode == 0, done.stderr
    assert "making it again" in done.stdout
    assert [call.split()[1] for call in checkout.take_calls()] == ["venv", "pip"]
    assert checkout.bootstrap(group).stdout == ""


def test_a_failed_install_is_an_error_and_keeps_what_was_there(checkout: Checkout, tmp_path: Path) -> None:
    checkout.bootstrap("core")
    checkout.take_calls()
    (tmp_path / "pip-fails").touch()
    assert checkout.bootstrap("test").returncode == 1
    assert checkout.bootstrap("core").returncode == 0  # someone offline keeps the demo
    (tmp_path / "pip-fails").unlink()
    assert checkout.bootstrap("test").returncode == 0
    assert [call.split()[1] for call in checkout.take_calls()] == ["pip", "pip"]


@pytest.mark.parametrize("damage", ["empty folder", "interpreter gone", "moved"])
def test_a_broken_environment_is_made_again(checkout: Checkout, damage: str, tmp_path: Path) -> None:
    if damage == "empty folder":
        (checkout.root / ".venv").mkdir()
    else:
        checkout.bootstrap()
        checkout.take_calls()
    if damage == "interpreter gone":
        (checkout.root / ".venv/bin/python").unlink()
    if damage == "moved":
        checkout.root = checkout.root.rename(tmp_path / "elsewhere")
    assert checkout.bootstrap().returncode == 0
    assert checkout.take_calls()[0] == "-m venv .venv"


def test_another_interpreter_makes_it_again_only_when_it_is_named(checkout: Checkout, tmp_path: Path) -> None:
    checkout.bootstrap()
    checkout.take_calls()
    named = checkout.env.pop("PYTHON")
    checkout.env["PATH"] = f"{tmp_path / 'other'}:{checkout.env['PATH']}"
    other = script(tmp_path / "other/python3", f'exec {named} "$@"')
    checkout.bootstrap()
    assert checkout.take_calls() == []
    checkout.env["PYTHON"] = str(other)
    checkout.bootstrap()
    assert checkout.take_calls()[0] == "-m venv .venv"


# --- make and CI ------------------------------------------------------------------------------------------------------


def test_make_alone_prints_every_target(checkout: Checkout) -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    done = checkout.run("make")
    assert done.returncode == 0
    for target in phony[1].split():
        assert re.search(rf"^  make {target} +\w", done.stdout, re.MULTILINE), target


def test_make_demo_passes_arguments_on(checkout: Checkout) -> None:
    assert checkout.bootstrap().returncode == 0
    script(checkout.root / ".venv/bin/gradmon", 'printf "[%s]" "$@"')
    assert "[demo][--steps][100]" in checkout.run("make", "demo", "ARGS=--steps 100").stdout


@pytest.mark.parametrize(("failing", "status"), [("", 0), ("test", 1), ("lint", 1)])
def test_ci_runs_both_parts_and_fails_with_either(
    checkout: Checkout, tmp_path: Path, failing: str, status: int
) -> None:
    for name in ("prometheus", "promtool", "prometheus-alertmanager", "amtool", "chromium", "python3"):
        script(tmp_path / "bin" / name, "")
    script(tmp_path / "bin/apt-get", f"touch {tmp_path}/apt-was-called")
    script(tmp_path / "bin/make", f'echo "make $1 all=$GRADMON_TEST_ALL"; [ "$1" != "{failing}" ]')
    checkout.env["PATH"] = f"{tmp_path / 'bin'}:{checkout.env['PATH']}"
    done = checkout.run(".ci/run")
    assert done.returncode == status, done.stderr
    assert re.findall("^make .*", done.stdout, re.MULTILINE) == ["make test all=1", "make lint all=1"]
    verdicts = dict(re.findall(r"^== make (\w+): (\w+).* after \d+ s$", done.stdout, re.MULTILINE))
    assert verdicts == {part: "FAILED" if part == failing else "passed" for part in ("test", "lint")}
    assert not (tmp_path / "apt-was-called").exists()


# --- the agent's image ------------------------------------------------------------------------------------------------


def test_the_image_takes_the_dependencies_without_torch(tmp_path: Path) -> None:
    extraction = re.search(r"^RUN (python -c '.*') > requirements.txt", (ROOT / "Dockerfile").read_text(), re.M)
    assert extraction
    if sys.version_info < (3, 11):
        pytest.skip("the image's Python has tomllib, this one has not")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = extraction[1].replace("python", sys.executable, 1)
    lines = subprocess.check_output(["sh", "-c", command], cwd=tmp_path, text=True).splitlines()
    dependencies = pyproject()["project"]["dependencies"]
    assert [d for d in dependencies if d not in lines] == ["torch>=2.6"]
    assert set(lines) < set(dependencies)


def test_the_image_may_copy_what_it_copies() -> None:
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        copied |= set(line.split())
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert copied == {line[1:] for line in ignore if line.startswith("!")}
    needed = {pyproject()["project"]["readme"], *pyproject()["project"]["license-files"], "gradmon"}
    assert {name.split("/")[0] for name in needed} <= copied


# --- the wheel --------------------------------------------------------------------------------------------------------


def shipped() -> list[Path]:
    files = (path.relative_to(ROOT) for path in (ROOT / "gradmon").rglob("*") if path.is_file())
    return [path for path in files if "__pycache__" not in path.parts]


def test_every_file_of_the_package_reaches_the_wheel() -> None:
    files = shipped()
    assert Path("gradmon/py.typed") in files
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["gradmon"]
    for path in files:
        assert (ROOT / path).with_name("__init__.py").exists() or path.suffix != ".py", f"{path}: no __init__.py"
        if path.suffix != ".py":
            inside = path.relative_to("gradmon").as_posix()
            assert any(fnmatch.fnmatch(inside, pattern) for pattern in patterns), f"{path}: not in package-data"
