"""Tables in the docs that come from code: `python tests/diagnose/test_explain_docs.py` writes them."""

from __future__ import annotations

import re
from pathlib import Path

import zoo_doctor
import zoo_replay
import zoo_watch
from healthy import HEALTHY

from gradmon import diagnose
from gradmon.diagnose.advice import advice_table

ZOO = Path(diagnose.__file__).with_name("ZOO.md")
ADVICE = ZOO.with_name("ADVICE.md")
CASES = (*zoo_replay.BROKEN, *zoo_doctor.BROKEN, *zoo_watch.BROKEN)
TOOLS = {"replay": "`gradmon replay`", "doctor": "`gradmon doctor`", "watch": "watch, while it trains"}


def zoo() -> str:
    healthy = ", ".join(one.name for one in HEALTHY)
    rows = []
    for case in CASES:
        telling = [" ".join(name.split()) for name in case.names]
        telling = [name for name in telling if len(name) > 4 and not name.endswith(".py") and name != "reproduced:"]
        names = ", ".join(f"`{name}`" for name in telling)
        rows.append(f"| {case.wrong} | {TOOLS[case.tool]} | {names} |\n")
    return (
        f"# Broken trainings that gradmon explains\n\n{len(CASES)} trainings, each broken for real in a test of "
        "`tests/diagnose`; the last column is what the answer must hold.\nOn "
        f"{len(HEALTHY)} healthy models ({healthy})\ndoctor, replay and watches must stay quiet.\n\n"
        "| what is wrong | who says so | what the answer names |\n|---|---|---|\n" + "".join(rows)
    )


def advice() -> str:
    return (
        "# What gradmon report advises\n\nEach rule asks the journals for its symptom; where it is there, the report "
        "says so with the run's own numbers.\n\n" + advice_table().strip() + "\n"
    )


def test_the_docs_hold_the_tables() -> None:
    assert ZOO.read_text() == zoo()
    assert ADVICE.read_text() == advice()


def test_the_catalogue_has_every_rule_of_the_doctor() -> None:
    """And no rule that the doctor does not know."""
    text = ZOO.with_name("CATALOGUE.md").read_text()
    chapter = text.split("## Rules of the doctor")[1].split("\n## ")[0]
    listed = set(re.findall(r"`([a-z0-9_]+)`", chapter))
    found = {case.names[0] for case in zoo_doctor.BROKEN if re.fullmatch(r"[a-z0-9_]+_[a-z0-9_]+", case.names[0])}
    assert len(found) > 15
    assert found <= listed
    source = "".join(path.read_text() for path in ZOO.parent.joinpath("doctor").glob("*.py"))
    assert not {rule for rule in listed if f'"{rule}"' not in source}


def test_there_are_enough_of_each() -> None:
    assert len({(case.tool, case.name) for case in CASES}) == len(CASES) >= 15
    assert len(HEALTHY) == 10


if __name__ == "__main__":
    ZOO.write_text(zoo())
    ADVICE.write_text(advice())
