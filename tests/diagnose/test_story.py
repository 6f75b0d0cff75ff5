"""The story that a run's journals tell: whole, killed, damaged, restarted; wherever they lie."""

from __future__ import annotations

import math
import shutil
import sqlite3
import subprocess
import sys
from itertools import pairwise

import pytest
from journals import (
    ROOT,
    WritingRank,
    event,
    healthy,
    identity,
    kill_in_mid_write,
    nonfinite,
    profile,
    record,
    row,
    spike,
    troubled,
    write_run,
)
from journals import detail as make_detail

from gradmon.diagnose.charts import BUCKETS, charts_of, extremes
from gradmon.diagnose.gather import NoJournalsError
from gradmon.diagnose.story import read_story
from gradmon.diagnose.telling import episode_text, verdict


def test_it_says_what_broke_first_and_what_was_done(tmp_path):
    story = read_story(write_run(tmp_path, troubled(), ranks=2, steps=700))
    first = story.first_nonfinite
    assert (first.step, first.rank, first.parameter, first.micro_step) == (120, 1, "blocks.2.mlp.up.weight", 2)
    assert first.nan_count == 64
    assert [one.step for one in story.incidents] == [120, 226, 227, 228, 229, 310, 333, 520, 600, 601, 602]
    assert (story.done("skip"), story.done("rescale"), story.done("backoff")) == (4, 7, 1)
    assert story.state == "finished"
    assert [rank.blamed for rank in story.ranks] == [7, 4]
    text = verdict(story).text
    assert text.startswith(
        "Training ran 700 steps on 2 ranks and finished; gradients broke first at step 120 on rank 1"
    )
    assert "(NaN in backward 2), before 10 more incidents; " in text
    assert text.endswith("gradmon rescaled 7 steps, skipped 4 and lowered the learning rate once.")


def test_spikes_before_the_first_nan_are_said(tmp_path):
    def script(rank, step):
        one = spike(step) if step in (20, 30) else nonfinite(step, rank=0, here=True) if step == 40 else record(step)
        return one, [] if one.healthy else [event(one)]

    text = verdict(read_story(write_run(tmp_path, script, steps=50))).text
    assert "gradients spiked from step 20 (2 spikes), not finite from step 40 in blocks.2.mlp.up.weight (NaN); " in text


def test_a_healthy_run_is_said_to_be_healthy(tmp_path):
    story = read_story(write_run(tmp_path, healthy(), steps=300))
    said = verdict(story)
    assert (said.look, said.text) == (
        "ok",
        "Training ran 300 steps on 1 rank and finished; all gradients were healthy.",
    )
    assert story.episodes == story.findings == story.incidents == ()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_short_run_has_a_story_too(tmp_path, steps):
    story = read_story(write_run(tmp_path, healthy(), steps=steps))
    assert len(story.history) == steps
    assert ("made no step" in verdict(story).text) == (steps == 0)
    assert bool(charts_of(story)) == (steps > 0)


@pytest.mark.parametrize("below", ["", "gpt-small", "gpt-small/i1", "gpt-small/i1/0"])
def test_run_instance_and_attempt_can_be_named(tmp_path, below):
    write_run(tmp_path, healthy(), ranks=2, steps=5)
    story = read_story(tmp_path / below)
    assert [rank.rank for rank in story.ranks] == [0, 1]
    assert len(story.history) == 5


def test_files_in_a_folder_of_their_own_will_do(tmp_path):
    """As in an archive or a mail: no lock, and nothing of the path left."""
    write_run(tmp_path / "there", healthy(), ranks=2, steps=5)
    copy = tmp_path / "case-17"
    copy.mkdir()
    for path in (tmp_path / "there/gpt-small/i1/0").glob("*.db"):
        shutil.copy(path, copy)
    story = read_story(copy)
    assert [rank.state for rank in story.ranks] == ["finished", "finished"]
    assert story.identity.run == "gpt-small"


def test_of_several_runs_the_last_started_is_told_and_any_can_be_named(tmp_path):
    write_run(tmp_path, healthy(), steps=3, run="old")
    write_run(tmp_path, healthy(), steps=3, run="new", started_seconds=2e9)
    assert read_story(tmp_path).identity.run == "new"
    assert read_story(tmp_path).others == ("old",)
    assert read_story(tmp_path, "old").identity.run == "old"
    with pytest.raises(NoJournalsError, match="no run named other; --run takes one of: new, old"):
        read_story(tmp_path, "other")


def test_without_journals_it_says_what_was_looked_for(tmp_path):
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/c/notes.txt").write_text("nothing")
    for place, why in (
        ("", "holds no journals .*rank-00000.db"),
        ("x", "does not exist"),
        ("a/b/c/notes.txt", "is a file"),
    ):
        with pytest.raises(NoJournalsError, match=f"{why}.*GRADMON_DIR"):
            read_story(tmp_path / place)


def test_what_a_killed_rank_has_written_is_there(tmp_path):
    kill_in_mid_write(tmp_path, after=600)
    story = read_story(tmp_path)
    assert story.state == "crashed"
    assert (tmp_path / "gpt-small/i1/0/rank-00000.db-wal").exists()  # in the middle of writing, indeed
    steps = list(story.history.steps)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 600
    assert "ended without a word (killed?)" in verdict(story).text


def test_damaged_journals_are_named_and_the_others_used(tmp_path):
    write_run(tmp_path, troubled(bad_rank=4), ranks=5, steps=400)
    folder = tmp_path / "gpt-small/i1/0"
    whole = (folder / "rank-00000.db").read_bytes()
    (folder / "rank-00000.db").write_bytes(whole[: len(whole) // 2])
    (folder / "rank-00001.db").write_bytes(b"")
    (folder / "rank-00002.db").write_bytes(b"no database at all" * 1000)
    newer = sqlite3.connect(folder / "rank-00003.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    story = read_story(tmp_path)
    assert [rank.rank for rank in story.ranks] == [4]
    assert [one.path.name for one in story.unread] == [f"rank-0000{i}.db" for i in range(4)]
    assert [one.why.split(" (")[0] for one in story.unread[::2]] == ["cut off or damaged"] * 2
    assert "upgrade" in story.unread[3].why
    assert story.first_nonfinite.step == 120
    assert len(story.history) == 400
    (folder / "rank-00004.db").write_bytes(b"")
    with pytest.raises(NoJournalsError, match=r"no journal in .* could be read .*archive"):
        read_story(tmp_path)


def test_restarts_are_one_story(tmp_path):
    """Killed at step 300, and again from the checkpoint of step 250."""
    rank = WritingRank(tmp_path, identity())
    for step in range(1, 301):
        broken = nonfinite(step, rank=0, here=True) if step == 280 else None
        rank.step(broken or record(step, loss=1.0), *([event(broken)] if broken else []))
    rank.end("exception", "RuntimeError: node lost")
    write_run(tmp_path, lambda _, step: (record(step, loss=2.0), []), attempt=1, first=251, steps=150)
    story = read_story(tmp_path)
    assert list(story.history.steps) == list(range(1, 401))
    assert story.history.column("loss")[249] == 1.0
    assert story.history.column("loss")[250] == 2.0
    assert [(one.first_step, one.last_step, one.state) for one in story.attempts] == [
        (1, 300, "exception"),
        (251, 400, "finished"),
    ]
    assert story.first_nonfinite.step == 280  # it happened, though its step was made again
    assert story.done("skip") == 1
    assert "in 2 attempts and finished" in verdict(story).text


def test_ranks_that_each_know_only_themselves_name_the_culprit(tmp_path):
    """Without rows of all ranks each rank blames itself or nobody."""
    for number in range(2):
        rank = WritingRank(tmp_path, identity(rank=number, world_size=2))
        rank.step(record(1))
        rank.step(nonfinite(2, rank=1 if number else None, here=number == 1))
        rank.end()
    assert read_story(tmp_path).first_nonfinite.rank == 1


def test_the_parameters_that_broke_first_are_those_of_the_rank_that_broke(tmp_path):
    for number in range(2):
        rank = WritingRank(tmp_path, identity(rank=number, world_size=2))
        rank.step(record(1))
        one = nonfinite(2, rank=1, here=number == 1)
        rows = profile(1.0)
        rows[3] = row(math.nan, nan_count=7, inf_count=2)
        details = [make_detail(2, rows, "local")] if number else [make_detail(2, [row(math.nan, nan_count=9)] * 19)]
        rank.step(one, event(one), details=details)
        rank.end()
    story = read_story(tmp_path)
    assert story.broke_first == ((story.parameters[3].name, 9),)


def test_five_thousand_spikes_are_one_line(tmp_path):
    rank = WritingRank(tmp_path, identity())
    for step in range(1, 5001):
        one = spike(step)
        rank.step(one, event(one))
    rank.end()
    story = read_story(tmp_path)
    assert len(story.incidents) == 5000
    (only,) = story.episodes
    assert episode_text(only) == (
        "5,000 spikes, steps 1 to 5,000, on rank 0, blocks.0.attn.qkv.weight; largest norm 30"
    )


def test_scattered_incidents_stay_a_few_lines(tmp_path):
    def script(rank, step):
        one = spike(step) if step % 50 == 0 else nonfinite(step, rank=0, here=True) if step % 70 == 0 else record(step)
        return one, [] if one.healthy else [event(one)]

    story = read_story(write_run(tmp_path, script, steps=4000))
    assert len(story.incidents) > 100
    assert 2 <= len(story.episodes) <= 16
    assert sum(one.count for one in story.episodes) == len(story.incidents)


def test_events_of_any_kind_are_findings_told_once(tmp_path):
    """Of what a rank found for itself, each rank's; of what all found, one."""
    for number in range(2):
        rank = WritingRank(tmp_path, identity(rank=number, world_size=2))
        one = record(1)
        rank.step(one, event(one, "all saw it", kind="never_heard_of", action="none", rank=None))
        rank.step(record(2), event(one, "saw it here", kind="in_my_data", action="none", rank=number, step=2))
        rank.end()
    found = read_story(tmp_path).findings
    assert [(one.kind, one.count, one.ranks[0][0]) for one in found] == [
        ("never_heard_of", 1, None),
        ("in_my_data", 1, 0),
        ("in_my_data", 1, 1),
    ]
    assert found[0].message == "all saw it"


def test_settings_that_differ_are_found(tmp_path):
    from gradmon.config import ClipConfig, Config

    rank = WritingRank(tmp_path, identity(), config=Config(clip=ClipConfig(max_norm=1.5)).to_dict())
    rank.step(record(1))
    rank.end()
    assert read_story(tmp_path).changed_settings() == {"clip.max_norm": (1.5, None)}


def test_thinning_keeps_extremes_and_gaps():
    values = [1.0 + i / 1e6 for i in range(50_000)]
    values[12_345], values[23_456], values[34_567] = 99.0, -5.0, math.nan
    places = extremes([values])
    assert len(places) <= 3 * BUCKETS + 2
    assert {0, 12_345, 23_456, 34_567, 49_999} <= set(places)
    assert all(a < b for a, b in pairwise(places))


def test_a_peak_of_one_rank_in_one_step_is_on_the_chart(tmp_path):
    def script(rank, step):
        return record(step, local_grad_norm=777.0 if (rank, step) == (9, 1501) else 1.0, loss=1.0), []

    story = read_story(write_run(tmp_path, script, ranks=12, steps=2000, details=False))
    (chart,) = [one for one in charts_of(story) if one["title"].startswith("Local")]
    assert len(chart["x"]) < 500
    assert max(chart["band"]["high"]) == 777.0
    assert sorted(one["label"] for one in chart["lines"])[0] == "median"
    assert len(chart["lines"]) == 5


def test_it_needs_no_torch(tmp_path):
    write_run(tmp_path, troubled(), ranks=2, steps=130)
    code = f"""
import sys
sys.modules['torch'] = None
import argparse
from gradmon.diagnose import compare, report
for module, where in ((report, ["{tmp_path}"]), (compare, ["{tmp_path}", "{tmp_path}"])):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args([*where, "--text"])) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "broke first at step 120 on rank 1" in done.stdout


def test_the_bundle_to_replay_is_that_of_the_first_step_that_broke(tmp_path):
    write_run(tmp_path, troubled(), ranks=2, steps=300)
    folder = tmp_path / "gpt-small/i1/0"
    for name in ("rank-00000-step-0000040", "rank-00001-step-0000120", "rank-00000-step-0000226"):
        (folder / f"{name}.bundle").touch()
    story = read_story(tmp_path)
    assert [(one.rank, one.step) for one in story.bundles] == [(0, 40), (1, 120), (0, 226)]
    assert story.best_bundle.step == 120
