"""deploy/ as data: where it is, its YAML documents, and what a kustomization refers to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("daemonset", "sidecar")


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def yaml_files() -> list[Path]:
    return sorted(path for pattern in ("*.yml", "*.yaml") for path in DEPLOY.rglob(pattern))


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping within a document."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def kustomized(folder: Path) -> Iterator[tuple[Path, Any]]:
    """The manifests that a kustomization brings together, before its own changes, with the file each is in."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    for name in (*kustomization.get("resources", ()), *kustomization.get("components", ())):
        path = (folder / name).resolve()
        if path.is_dir():
            yield from kustomized(path)
        else:
            # kustomize reads no file from outside the folder of a kustomization, only other kustomizations.
            assert path.is_relative_to(folder.resolve()), f"{folder}: {name} lies outside"
            yield from ((path, document) for document in documents(path))
    for generator in kustomization.get("configMapGenerator", ()):
        for name in generator["files"]:
            assert (folder / name).is_file(), f"{folder}: {name} is missing"


def pod_specs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (mapping["spec"] for mapping in walk(document) if "containers" in mapping.get("spec", {}))


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", ()), *spec["containers"]]
