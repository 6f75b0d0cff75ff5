"""Across all of deploy/: files parse, images are pinned, what is referred to is there, figures agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from manifests import DEPLOY, ROOT, documents, walk, yaml_files

from gradmon.config import Config

MARKDOWN = sorted(DEPLOY.rglob("*.md"))


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_parses_and_holds_something(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))
    assert documents(path)


def test_every_image_has_a_version() -> None:
    images = {
        str(mapping["image"])
        for path in yaml_files()
        for document in documents(path)
        for mapping in walk(document)
        if isinstance(mapping.get("image"), str)
    }
    # The DaemonSet's gets its tag from the overlay's `images:`, which test_kubernetes.py builds.
    images.remove("gradmon-agent")
    assert len(images) >= 5
    for image in images:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image), image
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases[0])


def test_one_port_everywhere() -> None:
    port = Config().agent.port
    texts = [path.read_text() for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".json"]
    texts.append((ROOT / "Dockerfile").read_text())
    # As a port; the user and group ids are the same number on purpose.
    ports = {
        int(n) for text in texts for n in re.findall(r"(?:containerPort: |--port[= ]|127\.0\.0\.1:)(1\d{4})\b", text)
    }
    assert ports == {port}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_files_named_in_a_text_are_there(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).exists(), f"{path}: {target}"
    for name in re.findall(r"(?<![\w/.])deploy/[\w./-]+\w", text):
        assert (ROOT / name).exists(), f"{path}: {name}"


def test_the_table_names_every_folder() -> None:
    text = (DEPLOY / "README.md").read_text()
    folders = [path.name for path in DEPLOY.iterdir() if path.is_dir()]
    assert len(folders) >= 7
    for folder in folders:
        assert f"]({folder}" in text, folder


def test_versions_in_the_text_are_those_in_the_files() -> None:
    text = (DEPLOY / "README.md").read_text()
    compose = (DEPLOY / "compose/compose.yaml").read_text()
    images = re.findall(r"image: (\S+/\S+)", compose)
    assert len(images) == 3
    for image in images:
        assert f"`{image}`" in text
    assert re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0] in text
