from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradmon import identity
from gradmon.identity import (
    DirectoryError,
    EnvironmentVariableError,
    RankEnvironment,
    choose_directory,
    claim_run,
    instance_name,
    linger_seconds,
    page_hint,
    rank_environment,
    run_name,
)
from gradmon.locks import drop_lock, hold_lock

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"}


def test_no_launcher_is_rank_0_of_1() -> None:
    assert rank_environment({}) == RankEnvironment(0, 0, 1, 0)


def test_torchrun() -> None:
    assert rank_environment(TORCHRUN) == RankEnvironment(3, 1, 4, 2)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_a_partial_environment_names_what_is_missing(missing: str) -> None:
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(EnvironmentVariableError, match=f"^{missing} not set although .* torchrun"):
        rank_environment(environ)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"RANK": "x"}, r"RANK must be a number from 0 up \(got 'x'\)"),
        ({"RANK": "4"}, r"RANK must be below WORLD_SIZE \(got RANK=4, WORLD_SIZE=4\)"),
    ],
)
def test_nonsense_environment(changes: dict[str, str], complaint: str) -> None:
    with pytest.raises(EnvironmentVariableError, match=complaint):
        rank_environment({**TORCHRUN, **changes})


@pytest.mark.parametrize(
    ("configured", "environ", "script", "name"),
    [
        ("llama-7b", {"SLURM_JOB_NAME": "x"}, "train.py", "llama-7b"),
        (None, {"SLURM_JOB_NAME": "my job/1"}, "train.py", "my-job-1"),
        (None, {}, "/home/me/pre train.py", "pre-train"),
        (None, {}, "pkg.train", "pkg"),
        ("a~2", {}, "x.py", "a-2"),
        ("日本", {}, "x.py", "run"),
        ("x" * 100, {}, "x.py", "x" * 64),
    ],
)
def test_run_names(configured: str | None, environ: dict[str, str], script: str, name: str) -> None:
    assert run_name(configured, environ, script) == name


def test_instances() -> None:
    assert instance_name({"SLURM_JOB_ID": "77"}) == "slurm-77"
    assert instance_name({"TORCHELASTIC_RUN_ID": "6d0f"}) == "6d0f"
    mine, again = instance_name({}), instance_name({})
    assert mine == again
    assert mine.endswith(f"-{os.getpid()}")
    # torchrun's id is "none" unless chosen: its own process, our parent, is the same for every attempt
    assert instance_name({"TORCHELASTIC_RUN_ID": "none"}).endswith(f"-{os.getppid()}")


def test_a_second_living_instance_gets_another_name(tmp_path: Path) -> None:
    assert claim_run(tmp_path, "job", "one") == "job"
    lock = tmp_path / "job" / "one" / "0" / "rank-00000.lock"
    lock.parent.mkdir(parents=True)
    held = hold_lock(lock)
    assert claim_run(tmp_path, "job", "two") == "job~2"
    assert claim_run(tmp_path, "job", "one") == "job", "a restart keeps its name"
    drop_lock(held)
    assert claim_run(tmp_path, "job", "two") == "job~2", "also when the other has ended meanwhile"
    assert claim_run(tmp_path, "job", "three") == "job", "a later one may have the name again"


def test_a_claim_stands_before_any_rank_has_come(tmp_path: Path) -> None:
    """Two jobs of one name that start at the same moment."""
    assert claim_run(tmp_path, "job", "one") == "job"
    assert claim_run(tmp_path, "job", "two") == "job~2"
    for claimed in (tmp_path / "job" / "one", tmp_path / "job~2" / "two"):
        os.utime(claimed, (0, 0))
    assert claim_run(tmp_path, "job", "three") == "job", "a claim nobody came for is void after a while"


def test_configured_directory_must_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_directory(str(tmp_path / "a" / "b"), {}) == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DirectoryError, match=r"file/x can't be made .* set GRADMON_DIR"):
        choose_directory(str(file / "x"), {})
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(DirectoryError, match=r"can't be written by user .* set GRADMON_DIR"):
        choose_directory(str(tmp_path), {})


def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "file_system", lambda path: "nfs4" if "home" in str(path) else "ext4")
    with pytest.raises(DirectoryError, match=r"/home/me is on a network file system \(nfs4\).* set GRADMON_DIR"):
        choose_directory("/home/me", {})
    local = choose_directory(None, {"HOME": "/home/me", "SLURM_TMPDIR": str(tmp_path)})
    assert local == tmp_path / "gradmon"


def test_file_system_of_what_is_not_there_yet() -> None:
    assert identity.file_system(Path("/proc/1/none")) == "proc"
    assert identity.file_system(Path("/sys/none/none")) == "sysfs"


def test_state_home_comes_before_tmp(tmp_path: Path) -> None:
    assert choose_directory(None, {"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "gradmon"
    assert choose_directory(None, {"HOME": str(tmp_path)}) == tmp_path / ".local" / "state" / "gradmon"


def test_a_shared_directory_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "gradmon"
    path.mkdir(mode=0o755)
    with pytest.raises(DirectoryError, match="is not private to user"):
        identity._prepare_shared(path)


class TestSharedDirectory:
    """Another user's directory; tests/agent/test_users.py has real other users."""

    @pytest.fixture
    def shared(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Made by this user, who then becomes another one."""
        (tmp_path / "agent.lock").touch()
        tmp_path.chmod(0o3770)
        monkeypatch.setattr(identity, "_user_name", lambda: "alice")
        monkeypatch.setattr(os, "getuid", lambda: 4711)
        return tmp_path

    def test_ours_is_a_folder_in_it(self, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(
            DirectoryError, match=r"alice belongs to another user \(uid \d+\); remove it, or set GRADMON_DIR"
        ):
            choose_directory(str(shared), {})  # a folder made by whom we really are
        assert identity.agent_directory(str(shared), {}) == shared, "an agent serves all of it"
        monkeypatch.undo()
        assert choose_directory(str(shared), {}) == shared, "one's own needs no folder"

    def test_the_system_directory_comes_first(self, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(identity, "SYSTEM_DIRECTORY", shared)
        assert identity.agent_directory(None, {"HOME": "/nonexistent"}) == shared

    def test_it_is_shared_only_where_an_agent_has_served_it(
        self, shared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """/scratch/alice is alice's own, whoever owns /scratch."""
        (shared / "alice").mkdir()
        (shared / "bob").mkdir()
        assert identity.shared_root(shared / "alice") == shared
        assert identity.shared_root(shared / "bob") is None
        (shared / "agent.lock").unlink()
        assert identity.shared_root(shared / "alice") is None
        (shared / "agent.lock").touch()
        monkeypatch.undo()
        assert identity.shared_root(shared / "alice") is None, "our own directory"

    def test_names_are_claimed_among_all_users(self, shared: Path) -> None:
        lock = shared / "bob" / "job" / "theirs" / "0" / "rank-00000.lock"
        lock.parent.mkdir(parents=True)
        (shared / "alice").mkdir()
        held = hold_lock(lock)
        assert claim_run(shared / "alice", "job", "mine") == "job~2"
        assert (shared / "alice" / "job~2" / "mine").is_dir()
        drop_lock(held)
        assert claim_run(shared / "alice", "job", "later") == "job"

    def test_the_claim_opens_what_another_user_locked_and_made(self, shared: Path) -> None:
        (shared / "alice").mkdir()
        claim_run(shared / "alice", "job", "one")
        assert (shared / ".claims.lock").stat().st_mode & 0o777 == 0o644
        (shared / ".claims.lock").chmod(0o444)
        assert claim_run(shared / "alice", "job", "two") == "job~2"


def test_where_the_page_is() -> None:
    assert page_hint("http://127.0.0.1:1/", {}) == "http://127.0.0.1:1/"
    assert "ssh -L 1:127.0.0.1:1 " in page_hint("http://127.0.0.1:1", {"SSH_CONNECTION": "x"})
    assert "kubectl port-forward pod/" in page_hint("http://127.0.0.1:1", {"KUBERNETES_SERVICE_HOST": "x"})
    assert "open https://127.0.0.1:1)" in page_hint("https://pod:1", {"KUBERNETES_SERVICE_HOST": "x"})


def test_linger() -> None:
    assert linger_seconds(5.0, {"SLURM_JOB_ID": "1"}) == 5.0
    assert linger_seconds(None, {"SLURM_JOB_ID": "1"}) == 0.0
    assert linger_seconds(None, {"KUBERNETES_SERVICE_HOST": "1"}) == 0.0
