"""Several users of one node and a site's agent under a user of its own (system mode), with real user ids."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fake_journals import ROOT, AgentProcess, until

from gradmon.agent.places import find_journals
from gradmon.agent.prune import prune

AGENT, ALICE, BOB, STRANGER = 61001, 61002, 61003, 61004
GROUP = 61010

#: A rank as `attach` starts it, under another user: it chooses its directory, claims its name, and writes.
_RANK = """
import os, sys, pwd
sys.path[:0] = {paths!r}
from pathlib import Path
from fake_journals import FakeRank, identity, record
from gradmon.identity import choose_directory, claim_run
import encodings.idna, psutil
os.setgroups({groups!r}); os.setgid({uid}); os.setuid({uid})
os.umask({umask})
directory = choose_directory({directory!r}, {{}})
run = claim_run(directory, "train", "{uid}")
rank = FakeRank(directory, identity(run=run, instance="{uid}", host="node-a")).step(record(1))
print(run, directory, flush=True)
sys.stdin.read()
rank.end()
"""
_AGENT = f"""
import os
import gradmon.agent.server, encodings.idna
import uvicorn.protocols.http.h11_impl, uvicorn.lifespan.off, uvicorn.loops.auto
os.setgroups([{GROUP}]); os.setgid({AGENT}); os.setuid({AGENT})
"""


@pytest.fixture(autouse=True)
def _root():
    if os.getuid() != 0:
        if os.environ.get("GRADMON_TEST_ALL") == "1":
            pytest.fail("only root can be several users, and GRADMON_TEST_ALL=1 allows no test to be left out")
        pytest.skip("a second user (to become one, be root) is not installed: left out")


@pytest.fixture
def shared():
    """/var/lib/gradmon as deploy/slurm makes it: the agent's, writable by the site's group, setgid, sticky."""
    folder = Path(tempfile.mkdtemp(prefix="gradmon-users-"))  # pytest's own are closed to other users
    os.chown(folder, AGENT, GROUP)
    folder.chmod(0o3770)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def rank_of(uid: int, directory: Path, umask: int = 0o022, groups=(GROUP,)):
    """(process, name of its run, its directory)"""
    paths = [str(Path(__file__).parent), str(ROOT)]
    code = _RANK.format(uid=uid, directory=str(directory), umask=umask, groups=list(groups), paths=paths)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        try:
            said = process.stdout.readline().split()
            assert said, "the rank did not start"
            yield process, said[0], Path(said[1])
        finally:
            process.stdin.close()
            process.wait(30)


def modes(folder: Path) -> dict[str, str]:
    found = [folder, *folder.rglob("*")]
    return {str(p.relative_to(folder.parent)): oct(stat.S_IMODE(p.stat().st_mode)) for p in found}


def states(agent: AgentProcess) -> dict[str, str]:
    return {run["run"]: run["state"] for run in agent.json("/api/runs")["runs"]}


def test_the_sites_agent_reads_living_killed_and_finished_journals_of_two_users(shared):
    with AgentProcess(shared, prelude=_AGENT) as agent:
        assert agent.address
        with rank_of(ALICE, shared, umask=0o077) as (alice, run, directory):
            assert (run, directory) == ("train", shared / f"uid-{ALICE}")
            with rank_of(BOB, shared) as (bob, second, _):
                assert second == "train~2", "two users' runs of one name"
                until(lambda: states(agent) == {"train": "running", "train~2": "running"})
                bob.send_signal(signal.SIGKILL)
                bob.wait()
                until(lambda: states(agent) == {"train": "running", "train~2": "crashed"})
        assert alice.returncode == 0
        until(lambda: states(agent) == {"train": "finished", "train~2": "crashed"})
        text = agent.get("/metrics")
        assert 'gradmon_steps_total{rank="0",run="train"} 1.0' in text
        assert 'gradmon_steps_total{rank="0",run="train~2"} 1.0' in text
        assert 'gradmon_agent_errors_total{part="journal"} 0.0' in text
        code, log = agent.end()
        assert (code, "Traceback" in log) == (0, False)


def test_folders_and_files_are_the_groups_to_read_and_nobodys_else(shared):
    with AgentProcess(shared, prelude=_AGENT) as agent:
        assert agent.address
    with rank_of(ALICE, shared, umask=0o077):
        found = modes(shared / f"uid-{ALICE}")
    place = f"uid-{ALICE}"
    assert {found[f"{place}{below}"] for below in ("", "/train", f"/train/{ALICE}", f"/train/{ALICE}/0")} == {"0o2750"}
    journal = f"{place}/train/{ALICE}/0/rank-00000"
    assert [found[journal + suffix] for suffix in (".db", ".db-wal", ".db-shm", ".lock")] == ["0o640"] * 4


def test_a_user_without_the_group_is_refused_with_the_cure(shared):
    code = _RANK.format(uid=STRANGER, directory=str(shared), umask=0o022, groups=[], paths=[str(ROOT / "tests/agent")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert f"DirectoryError: dir {shared} can't be written by user {STRANGER}; set GRADMON_DIR" in done.stderr


def test_a_folder_that_another_user_made_is_not_taken(shared):
    trap = shared / f"uid-{ALICE}"
    trap.mkdir()
    os.chown(trap, BOB, GROUP)
    trap.chmod(0o777)
    code = _RANK.format(
        uid=ALICE, directory=str(shared), umask=0o022, groups=[GROUP], paths=[str(ROOT / "tests/agent")]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert f"DirectoryError: dir {trap} belongs to another user (uid {BOB})" in done.stderr


def test_an_open_directory_of_a_pod_is_read_by_an_agent_without_the_group(shared):
    """emptyDir: root's, 0777, no group. The trainer is one user, the sidecar another."""
    os.chown(shared, 0, 0)
    shared.chmod(0o777)
    with rank_of(ALICE, shared, groups=()) as (_, run, directory):
        assert (run, directory) == ("train", shared / f"uid-{ALICE}")
        with AgentProcess(shared, prelude=_AGENT) as agent:
            until(lambda: states(agent) == {"train": "running"})


def test_decimal_names_and_both_layouts(tmp_path, monkeypatch):
    """A user's instance called 7 is no attempt; root's own runs lie flat beside the folders of users."""
    for folder in ("alice/train/7/0", "alice/train/7/1", "flat/i1/0", "flat/7/3"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rank-00000.db").touch()
    os.chown(tmp_path / "alice", ALICE, -1)
    found = {(p.user, p.run, p.instance, p.attempt) for p in find_journals(tmp_path)}
    assert found == {
        ("alice", "train", "7", 0),
        ("alice", "train", "7", 1),
        ("", "flat", "i1", 0),
        ("", "flat", "7", 3),
    }
    os.chown(tmp_path / "alice", 0, -1)  # a folder of one's own is a run
    assert {p.run for p in find_journals(tmp_path)} == {"flat"}


def test_each_user_prunes_their_own(shared):
    with rank_of(ALICE, shared) as (_, _, directory):
        pass
    process = os.fork()
    if process == 0:  # the agent can't delete what is alice's, and does not fail for that
        code = 1
        with contextlib.suppress(BaseException):
            os.setgroups([GROUP])
            os.setgid(AGENT)
            os.setuid(AGENT)
            code = 0 if prune(shared, keep_seconds=-1) == [] else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (directory / "train").exists()
    assert prune(directory, keep_seconds=-1) == [directory / "train" / str(ALICE)]
