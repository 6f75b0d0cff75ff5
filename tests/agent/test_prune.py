"""Old instances go, living ones and other people's files stay."""

from __future__ import annotations

import os
import time

import pytest
from fake_journals import FakeRank, identity, nonfinite, record

from gradmon.agent.prune import KEEP_SECONDS, living_ranks, prune


@pytest.fixture
def instance(tmp_path):
    """Makes an instance of so many days of age."""
    living = []

    def make(name: str, *, days: float = 0, incident: bool = False, end: bool = True):
        rank = FakeRank(tmp_path, identity(instance=name)).step(nonfinite(1) if incident else record(1))
        living.append(rank)
        if end:
            rank.end()
        then = time.time() - days * 24 * 3600
        for file in rank.path.parent.iterdir():
            os.utime(file, (then, then))
        return tmp_path / "demo" / name

    yield make
    for rank in living:
        rank.end()


def test_what_is_older_than_a_week_goes(tmp_path, instance):
    old, young = instance("old", days=8), instance("young", days=6)
    assert prune(tmp_path) == [old]
    assert not old.exists()
    assert young.exists()
    assert KEEP_SECONDS == 7 * 86400


def test_bundles_and_the_marker_file_go_with_their_journals(tmp_path, instance):
    old = instance("old", days=8)
    for name in ("rank-00000-step-0000123.bundle", "health.json"):
        (old / "0" / name).write_text("ours")
        os.utime(old / "0" / name, (0, 0))
    assert prune(tmp_path) == [old]
    assert not old.exists()


def test_a_living_one_stays_however_old_and_large(tmp_path, instance):
    living = instance("living", days=100, end=False)
    assert prune(tmp_path, keep_bytes=0) == []
    assert living_ranks(tmp_path) == 1
    assert (living / "0" / "rank-00000.db").exists()


def test_beyond_the_size_the_oldest_go_first_and_incidents_last(tmp_path, instance):
    incident = instance("incident", days=5, incident=True)
    older, newer = instance("older", days=4), instance("newer", days=3)
    size = sum(file.stat().st_size for file in (incident / "0").iterdir())
    assert prune(tmp_path, keep_bytes=int(2.5 * size)) == [older]
    assert prune(tmp_path, keep_bytes=int(1.5 * size)) == [newer]
    assert incident.exists()
    assert prune(tmp_path, keep_bytes=0) == [incident]
    assert not (tmp_path / "demo").exists()  # the last one takes the run's folder along


def test_below_the_size_nothing_goes(tmp_path, instance):
    instance("one")
    assert prune(tmp_path) == []


def test_files_of_others_stay(tmp_path, instance):
    old = instance("old", days=8)
    (old / "notes.txt").write_text("mine")
    (old / "0" / "rank-00000.txt").write_text("mine")
    (tmp_path / "demo" / "folder" / "0").mkdir(parents=True)
    (tmp_path / "demo" / "folder" / "0" / "thesis.tex").write_text("mine")
    prune(tmp_path, keep_bytes=0)
    left = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert left == ["demo/folder/0/thesis.tex", "demo/old/0/rank-00000.txt", "demo/old/notes.txt"]


def test_links_are_not_followed(tmp_path, instance):
    old = instance("old", days=8)
    outside = tmp_path / "outside"
    old.rename(outside)
    (tmp_path / "demo" / "link").symlink_to(outside)
    assert prune(tmp_path, keep_bytes=0) == []
    assert (outside / "0" / "rank-00000.db").exists()
