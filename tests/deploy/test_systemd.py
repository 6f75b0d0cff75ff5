"""The unit against systemd's own checks, and the directory that its snippets make."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import DEPLOY

SYSTEMD = DEPLOY / "systemd"
UNIT = "gradmon-agent.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is here."""
    text = (SYSTEMD / UNIT).read_text()
    assert "ExecStart=/opt/gradmon/bin/gradmon agent " in text
    path = tmp_path / UNIT
    path.write_text(text.replace("/opt/gradmon/bin/gradmon", sys.executable))
    return path


def test_systemd_accepts_it(systemd_analyze: str, unit: Path) -> None:
    done = subprocess.run([systemd_analyze, "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHouse="))
    assert (
        "ProtectHouse" in subprocess.run([systemd_analyze, "verify", str(unit)], capture_output=True, text=True).stderr
    )


def test_it_is_hardened(systemd_analyze: str, unit: Path) -> None:
    command = [systemd_analyze, "security", "--offline=true", "--threshold=20", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    unit.write_text(re.sub(r"^(Protect|Restrict|Capab|SystemCall).*\n", "", unit.read_text(), flags=re.MULTILINE))
    assert subprocess.run(command, capture_output=True, text=True).returncode != 0


def test_its_directories_are_those_it_may_write() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(SYSTEMD / UNIT)
    service = parser["Service"]
    command = service["ExecStart"].replace("\\\n", " ").split()
    made = re.findall(r"^d (\S+) ", (SYSTEMD / "tmpfiles.conf").read_text(), re.MULTILINE)
    assert service["ReadWritePaths"].split() == made
    assert [command[command.index("--dir") + 1], command[command.index("--archive") + 1]] == made
    assert (service["User"], service["ProtectSystem"], service["NoNewPrivileges"]) == ("gradmon", "strict", "yes")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make other users' directories")
def test_the_journals_directory_is_shared_by_its_group(tmp_path: Path) -> None:
    tools = [shutil.which(name) for name in ("systemd-sysusers", "systemd-tmpfiles")]
    if None in tools:
        pytest.skip("systemd-sysusers is not installed: left out")
    (tmp_path / "etc").mkdir()
    for tool, arguments in zip(tools, (["sysusers.conf"], ["--create", "tmpfiles.conf"]), strict=True):
        arguments[-1] = str(SYSTEMD / arguments[-1])
        subprocess.run([str(tool), f"--root={tmp_path}", *arguments], check=True, capture_output=True)
    journals, archive = (tmp_path / "var/lib" / name for name in ("gradmon", "gradmon-archive"))
    for path, mode in ((journals, 0o3770), (archive, 0o750)):
        status = path.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (10855, 10855, mode)
    # What a trainer makes in it belongs to the group, which is how the agent may read it.
    (journals / "alice").mkdir(0o750)
    assert (journals / "alice").stat().st_gid == 10855
