"""`gradmon run`: scripts as people have them, with gradmon and without."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmon.journal import JournalView, read_journal

pytestmark = pytest.mark.timeout(600)  # the first test of a fixture waits for all of its runs
HERE = Path(__file__).parent
RUN = ("-m", "gradmon", "run")
LOOPS = (
    "plain", "clip_by_attribute", "clip_by_name", "scaler", "two_optimizers", "late_optimizer", "closure", "loader",
    "no_backward", "compiled", "adversaries",
)  # fmt: skip


def start(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GRADMON_", "TORCHELASTIC_"))}
    environment = {"GRADMON_DIR": str(folder / "journals"), "GRADMON_AGENT": "off", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env={**inherited, **environment, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def torchrun(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return start(*launch, *command, folder=folder)


def journals(folder: Path) -> list[JournalView]:
    """By attempt and rank; a second training of a process is its next attempt."""
    found = (folder / "journals").rglob("rank-*.db")
    return [read_journal(p) for p in sorted(found, key=lambda p: (int(p.parent.name), p.name))]


def script(folder: Path, text: str, name: str = "script.py") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return name


def finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in weights.values())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- one DDP script --------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a torchrun of ddp.py left behind."""

    weights: list[dict[str, dict[str, Tensor]]]
    journals: list[JournalView]
    said: str


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    found = {}
    for name, how in {"without": (), "with": ("-m", "gradmon", "run")}.items():
        folder = tmp_path_factory.mktemp(name)
        done = torchrun(*how, str(HERE / "ddp.py"), str(folder), folder=folder)
        assert done.returncode == 0, done.stderr
        weights = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
        found[name] = Job(weights, journals(folder), done.stderr)
    return found


def test_an_unchanged_ddp_script_has_the_same_weights(jobs: dict[str, Job]) -> None:
    for rank in range(2):
        assert same(jobs["with"].weights[rank]["clean"], jobs["without"].weights[rank]["clean"])
    first = jobs["with"].journals[:2]
    assert [journal.identity.topology for journal in first] == ["ddp", "ddp"]
    assert all([r.step for _, r in journal.steps] == list(range(1, 31)) for journal in first)
    records = [r for _, r in first[0].steps]
    assert max(r.grad_norm for r in records) > 1.0, "measured before the script's clip to 1.0"
    assert all(r.local_grad_norm is not None and r.loss is not None for r in records), "from the first step on"


def test_accumulation_with_no_sync_has_the_same_weights(jobs: dict[str, Job]) -> None:
    for rank in range(2):
        assert same(jobs["with"].weights[rank]["accumulated"], jobs["without"].weights[rank]["accumulated"])
        journal = jobs["with"].journals[2 + rank]
        assert [r.step for _, r in journal.steps] == list(range(1, 31)), "of two micro-steps each"
        first = journal.steps[0][1]
        assert first.loss == pytest.approx(math.log(256), rel=0.05), "an untrained model's, not half of it"
        assert {r.action for _, r in journal.steps} == {"none"}


def test_it_survives_a_nan_that_kills_it_alone(jobs: dict[str, Job]) -> None:
    assert not finite(jobs["without"].weights[0]["nan"])
    ours = [weights["nan"] for weights in jobs["with"].weights]
    assert finite(ours[0])
    assert same(*ours)
    third = jobs["with"].journals[4:]
    assert len(third) == 2, "each training of the process is watched for itself"
    assert [[r.step for _, r in journal.steps if r.action == "skip"] for journal in third] == [[15], [15]]
    assert "NaN and 0 Inf gradient elements on rank 1" in jobs["with"].said


# --- loops in one process --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("loops")
    without = start(str(HERE / "loops.py"), "without.pt", folder=folder)
    under = start(*RUN, str(HERE / "loops.py"), "with.pt", folder=folder)
    assert (without.returncode, under.returncode) == (3, 3), under.stderr
    return {
        "without": torch.load(folder / "without.pt"),
        "with": torch.load(folder / "with.pt"),
        "journals": journals(folder),
        "said": under.stderr,
    }


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_has_the_same_weights(loops: dict[str, Any], name: str) -> None:
    assert same(loops["with"][name], loops["without"][name])


def test_every_loop_was_watched_from_its_first_step_on(loops: dict[str, Any]) -> None:
    """One attempt for each; late_optimizer has two, the second going on where the first was."""
    names = [*LOOPS[:5], "late_optimizer", *LOOPS[5:]]
    expected = {"late_optimizer": 6, "closure": 4, "adversaries": 24}
    steps = {}
    for name, journal in zip(names, loops["journals"], strict=True):
        steps.setdefault(name, []).append([r.step for _, r in journal.steps])
        assert journal.identity.topology == "single"
        assert all((r.loss is None) == (name == "no_backward") for _, r in journal.steps), name
        assert not journal.events, name
    assert steps.pop("late_optimizer") == [list(range(1, 7)), list(range(7, 13))]
    assert steps == {name: [list(range(1, 1 + expected.get(name, 12)))] for name in steps}


def test_models_side_by_side_are_only_watched(loops: dict[str, Any]) -> None:
    """A norm that is usual for one of them may be a spike for the other."""
    assert [journal.identity.mode for journal in loops["journals"]] == ["guard"] * len(LOOPS) + ["observe"]
    assert loops["said"].count("only watching, not acting: several optimizers take turns") == 1


def test_norms_are_those_before_the_clip_and_losses_those_before_the_scale(loops: dict[str, Any]) -> None:
    plain, by_attribute, by_name, scaled = (
        [r for _, r in journal.steps] for journal in loops["journals"][: LOOPS.index("scaler") + 1]
    )
    assert by_attribute[0].grad_norm == by_name[0].grad_norm == plain[0].grad_norm > 0.1
    assert by_attribute[0].grad_norm_applied == pytest.approx(0.1, rel=1e-4)
    assert scaled[0].loss == pytest.approx(math.log(256), rel=0.05), "an untrained model's, not 1024 times that"


# --- what a script is to see -----------------------------------------------------------------------------------------


def test_a_script_sees_what_python_shows_it(tmp_path: Path) -> None:
    look = """
import argparse, os, sys
import neighbour
parser = argparse.ArgumentParser()
parser.add_argument("--observe", type=int)
parser.add_argument("-m")
print(sys.argv, parser.parse_known_args(), __name__, __file__, __package__, __spec__ and __spec__.name, sys.path[0])
print(sys.modules["__main__"].__dict__ is globals(), "torch" in sys.modules, __builtins__, __doc__)
"""
    script(tmp_path, "", "inner/neighbour.py")
    script(tmp_path, look, "inner/look.py")
    script(tmp_path, "", "inner/__init__.py")
    script(tmp_path, "import neighbour", "inner/__main__.py")
    script(tmp_path, look.replace("import neighbour", "from . import neighbour"), "inner/module.py")
    for target in (["inner/look.py"], ["-m", "inner.module"]):
        arguments = [*target, "--observe", "3", "-m", "x y", "--"]
        plain, ours = start(*arguments, folder=tmp_path), start(*RUN, *arguments, folder=tmp_path)
        assert plain.returncode == 0, plain.stderr
        assert (ours.returncode, ours.stdout) == (0, plain.stdout), ours.stderr
    assert start(*RUN, "inner", folder=tmp_path).returncode == 0, "a folder with a __main__.py"


@pytest.mark.parametrize(
    ("ending", "code"),
    [("raise ValueError('mine')", 1), ("import sys; sys.exit(3)", 3), ("raise KeyboardInterrupt", -signal.SIGINT),
     ("import sys; sys.exit('with a word')", 1), ("x = (", 1), ("import nowhere", 1)],
)  # fmt: skip
def test_a_script_ends_as_it_would(tmp_path: Path, ending: str, code: int) -> None:
    name = script(tmp_path, f"def inner():\n    {ending}\n\n\ninner()\n")
    plain, ours = start(name, folder=tmp_path), start(*RUN, name, folder=tmp_path)
    assert plain.returncode == ours.returncode == code
    said = [line for line in ours.stderr.splitlines() if not line.startswith("gradmon: nothing was watched")]
    assert said == plain.stderr.splitlines()


def test_what_it_starts_by_spawn_finds_it(tmp_path: Path) -> None:
    name = script(
        tmp_path,
        """
import multiprocessing, pickle
class Thing: pass
def double(thing): return type(thing).__module__, 2
if __name__ == "__main__":
    assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [Thing()]))
""",
    )
    plain, ours = start(name, folder=tmp_path), start(*RUN, name, folder=tmp_path)
    assert ours.stdout == plain.stdout == "[('__mp_main__', 2)]\n", ours.stderr


SPAWNS = """
import os
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
def train(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["PORT"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        loss = model(torch.randn(8, 4)).square().mean()
        if (rank, step) == (1, 5):
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.module.weight.isfinite().all()
    dist.destroy_process_group()
if __name__ == "__main__":
    torch.multiprocessing.spawn(train, nprocs=2)
"""


def test_ranks_that_it_starts_by_spawn_are_watched(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = start(*RUN, script(tmp_path, SPAWNS), folder=tmp_path, PORT=port)
    assert done.returncode == 0, done.stderr
    found = journals(tmp_path)
    assert [(j.identity.rank, j.identity.local_rank, j.identity.world_size) for j in found] == [(0, 0, 2), (1, 1, 2)]
    assert [[r.action for _, r in j.steps].index("skip") for j in found] == [5, 5]
    assert "nothing was watched" not in done.stderr


ODD = """
import gc, threading
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch._subclasses import FakeTensorMode

def train(model, optimizer, steps=4, nan_at=2):
    for step in range(steps):
        loss = model(torch.randn(8, 4)).square().mean() * (float("nan") if step == nan_at else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())

def another_hook():
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        for p in model.parameters():  # no backward: attached inside of the step, while torch goes through its hooks
            p.grad = torch.ones_like(p)
        optimizer.step()
    handle.remove()

def rehearsal():
    with FakeTensorMode():
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(8, 4)).mean().backward()
        optimizer.step()

def frozen():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.freeze()
    train(model, optimizer)
    gc.unfreeze()

def bare_tensor():
    model, temperature = torch.nn.Linear(4, 1), torch.zeros(1, requires_grad=True)
    train(model, torch.optim.AdamW([*model.parameters(), temperature]))

class SAM(torch.optim.Optimizer):
    def __init__(self, parameters, **options):
        super().__init__(parameters, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)
    def second_step(self):
        self.base_optimizer.step()

def never_steps_itself():
    model = torch.nn.Linear(4, 1)
    optimizer = SAM(model.parameters(), lr=0.1)
    optimizer.step = optimizer.second_step
    train(model, optimizer)

def in_a_thread():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    thread = threading.Thread(target=train, args=(model, optimizer))
    thread.start()
    thread.join()

torch.manual_seed(0)
"""


def test_odd_loops_run_and_are_watched(tmp_path: Path) -> None:
    calls = "another_hook(), rehearsal(), frozen(), bare_tensor(), never_steps_itself()"
    done = start(*RUN, script(tmp_path, ODD + calls), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [[r.action for _, r in journal.steps] for journal in journals(tmp_path)]
    healthy, guarded = ["none"] * 4, ["none", "none", "skip", "none"]
    # SAM is attached twice: itself, which never steps, and when what it holds does.
    assert [s for s in steps if s] == [healthy, guarded, guarded, guarded]
    assert "not watching" not in done.stderr


def test_training_in_a_thread_is_watched(tmp_path: Path) -> None:
    done = start(*RUN, script(tmp_path, ODD + "in_a_thread()"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (journal,) = journals(tmp_path)
    assert [r.action for _, r in journal.steps] == ["none", "none", "skip", "none"]


# --- what gradmon says -----------------------------------------------------------------------------------------------

TRAINS = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step(nan=False):
    loss = model(torch.randn(8, 4)).square().mean() * (float("nan") if nan else 1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_observe_only_watches(tmp_path: Path) -> None:
    name = script(tmp_path, TRAINS + "step(); step(nan=True); assert not model.weight.isfinite().all()")
    done = start(*RUN, "--observe", name, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (journal,) = journals(tmp_path)
    assert [(r.action, r.applied) for _, r in journal.steps][1] == ("skip", False)


def test_a_config_by_option_or_environment(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("run: by-option\n")
    name = script(tmp_path, TRAINS + "step()")
    assert start(*RUN, "--gradmon-config", "settings.yaml", name, folder=tmp_path).returncode == 0
    assert [j.identity.run for j in journals(tmp_path)] == ["by-option"]
    (tmp_path / "settings.yaml").write_text("clip: {max_nom: 1}\n")
    for refused in (
        start(*RUN, "--gradmon-config", "settings.yaml", name, folder=tmp_path),
        start(*RUN, name, folder=tmp_path, GRADMON_CONFIG="settings.yaml"),
    ):
        assert refused.returncode == 2
        assert "max_nom" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_what_it_says_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    missing = start(*RUN, "nowhere.py", folder=tmp_path)
    assert (missing.returncode, missing.stderr) == (
        2,
        "gradmon: can't read the script nowhere.py: No such file or directory\n",
    )
    module = start(*RUN, "-m", "nowhere.inside", folder=tmp_path)
    assert (module.returncode, module.stderr) == (2, "gradmon: no module named nowhere\n")
    idle = start(*RUN, script(tmp_path, TRAINS), folder=tmp_path)
    assert (idle.returncode, idle.stdout) == (0, "")
    assert idle.stderr.startswith("gradmon: nothing was watched: the script never stepped an optimizer")
    without = start(*RUN, script(tmp_path, "print('fine')"), folder=tmp_path)
    assert (without.returncode, without.stdout) == (0, "fine\n")
    assert without.stderr.startswith("gradmon: nothing was watched: the script never imported torch")
    raising = """
import logging
def refuse(record): raise RuntimeError("a filter of the script's")
logging.basicConfig()
logging.getLogger("gradmon").addFilter(refuse)
"""
    assert start(*RUN, script(tmp_path, raising), folder=tmp_path).returncode == 0


def test_a_script_that_forks_trains_on(tmp_path: Path) -> None:
    forks = """
import os
for _ in range(3): step()
child = os.fork()
for _ in range(3): step()
if child == 0: os._exit(0 if model.weight.isfinite().all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = start(*RUN, script(tmp_path, TRAINS + forks), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (journal,) = journals(tmp_path)
    assert [r.step for _, r in journal.steps] == list(range(1, 7)), "the parent's, and no step of the child's"


def test_an_optimizer_in_backward_is_left_alone(tmp_path: Path) -> None:
    inside = """
for p in model.parameters():
    its = torch.optim.SGD([p], lr=0.1)
    def step_now(p, its=its):
        its.step()
        its.zero_grad()
    p.register_post_accumulate_grad_hook(step_now)
for _ in range(3): model(torch.randn(8, 4)).square().mean().backward()
torch.save(model.state_dict(), "weights.pt")
"""
    name = script(tmp_path, TRAINS + inside)
    weights = []
    for how in ((), RUN):
        done = start(*how, name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(tmp_path / "weights.pt"))
    assert same(*weights)
    assert done.stderr.count("optimizers that step inside of backward") == 1


def test_a_script_that_attaches_by_itself_has_its_way(tmp_path: Path) -> None:
    by_itself = """
import gradmon
step()
with gradmon.attach(model, optimizer, config={"run": "its-own"}) as monitor:
    step(); step(nan=True)
    assert monitor.step == 2
assert model.weight.isfinite().all()
"""
    done = start(*RUN, script(tmp_path, TRAINS + by_itself), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {j.identity.run: len(j.steps) for j in journals(tmp_path)} == {"script": 1, "its-own": 2}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No agent, whatever the test did."""
    yield
    assert not (tmp_path / "journals" / "agent.lock").exists()
