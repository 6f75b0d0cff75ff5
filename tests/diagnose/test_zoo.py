"""The table of broken trainings in the docs: `python tests/diagnose/test_zoo.py` writes it."""

from __future__ import annotations

from pathlib import Path

import zoo_doctor
import zoo_replay
import zoo_watch
from healthy import HEALTHY

from gradmon import diagnose

ZOO = Path(diagnose.__file__).with_name("ZOO.md")
CASES = (*zoo_replay.BROKEN, *zoo_doctor.BROKEN, *zoo_watch.BROKEN)
TOOLS = {"replay": "`gradmon replay`", "doctor": "`gradmon doctor`", "watch": "watch, while it trains"}


def page() -> str:
    healthy = ", ".join(one.name for one in HEALTHY)
    rows = []
    for case in CASES:
        names = ", ".join("`" + " ".join(name.split()) + "`" for name in case.names)
        rows.append(f"| {case.wrong} | {TOOLS[case.tool]} | {names} |\n")
    return (
        f"# Broken trainings that gradmon explains\n\n{len(CASES)} trainings, each broken for real in a test of "
        "`tests/diagnose`; the last column is what the answer must hold.\nOn "
        f"{len(HEALTHY)} healthy models ({healthy})\ndoctor, replay and watches must stay quiet.\n\n"
        "| what is wrong | who says so | what the answer names |\n|---|---|---|\n" + "".join(rows)
    )


def test_the_docs_hold_the_table() -> None:
    assert ZOO.read_text() == page()
    assert len({(case.tool, case.name) for case in CASES}) == len(CASES) >= 15
    assert len(HEALTHY) == 10


if __name__ == "__main__":
    ZOO.write_text(page())
