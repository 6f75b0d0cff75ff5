"""The manifests against the schemas of Kubernetes and of prometheus-operator, and against what must fit together.

PyTorchJob has no definition here: its pod templates are validated as Kubernetes', the rest is compared by hand.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import KUBERNETES, OVERLAYS, containers, documents, kustomized, pod_specs, walk
from torch.distributed.run import parse_args

OLDEST, NEWEST = "1.29", "1.36"  # native sidecars are on since 1.29
EXAMPLES = sorted((KUBERNETES / "examples").glob("*.yaml"))
COMPONENTS = sorted(path.parent for path in KUBERNETES.glob("components/*/kustomization.yaml"))
GROUP = 10855


def manifests() -> list[tuple[Path, Any]]:
    found = [pair for overlay in OVERLAYS for pair in kustomized(KUBERNETES / "overlays" / overlay)]
    found += [pair for component in COMPONENTS for pair in kustomized(component)]
    found += [(path, document) for path in EXAMPLES for document in documents(path)]
    return found


def of_kind(kind: str) -> list[Any]:
    return [document for _, document in manifests() if document["kind"] == kind]


def definition(folder: Path, kind: str) -> Any:
    """The schema of a custom resource; strict, where the API server would drop unknown fields without a word."""
    (crd,) = documents(folder / f"monitoring.coreos.com_{kind.lower()}s.yaml")
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    for mapping in walk(schema):
        if "properties" in mapping and mapping.get("type") == "object":
            mapping.setdefault("additionalProperties", False)
        if isinstance(mapping.get("pattern"), str):  # Go takes flags anywhere, Python only in front
            mapping["pattern"] = ("(?i)" if "(?i)" in mapping["pattern"] else "") + mapping["pattern"].replace(
                "(?i)", ""
            )
    schema["properties"]["metadata"]["additionalProperties"] = True
    return schema


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_what_kubernetes_knows_is_valid(version: str) -> None:
    kinds = set()
    for path, document in manifests():
        kinds.add(document["kind"])
        if document["kind"] in ("PodMonitor", "PrometheusRule"):
            continue
        if document["kind"] == "PyTorchJob":
            for spec in document["spec"]["pytorchReplicaSpecs"].values():
                template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
                kubernetes_validate.validate({**template, "template": spec["template"]}, version, strict=True)
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{path}: {document['kind']}: {error}")
    assert {"DaemonSet", "Job", "NetworkPolicy", "PodMonitor", "PrometheusRule", "PyTorchJob", "Service"} <= kinds


def test_the_validation_sees_a_wrong_field() -> None:
    (daemonset,) = of_kind("DaemonSet")
    daemonset["spec"]["template"]["spec"]["containers"][0]["port"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(daemonset, NEWEST, strict=True)


@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_what_the_operator_knows_is_valid(definitions: Path, kind: str) -> None:
    schema = definition(definitions, kind)
    found = of_kind(kind)
    assert len(found) >= 2
    for document in found:
        jsonschema.validate(document, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, "spec": {**document["spec"], "unheardOf": 1}}, schema)


# --- what must fit together -------------------------------------------------------------------------------------------


def agents() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every agent with its pod."""
    for _, document in manifests():
        for spec in pod_specs(document):
            yield from ((spec, c) for c in containers(spec) if c["image"].startswith("gradmon-agent") and "args" in c)


def test_agents_are_locked_down() -> None:
    found = list(agents())
    assert len(found) == 2
    for spec, agent in found:
        context = {**spec["securityContext"], **agent["securityContext"]}
        assert context["runAsNonRoot"]
        assert (context["runAsUser"], context["runAsGroup"]) == (GROUP, GROUP)
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert agent["resources"]["limits"]["memory"]
        assert "--listen=$(POD_IP)" in agent["args"]
        assert not spec.get("automountServiceAccountToken", True)


def test_the_sidecar_serves_on_and_is_given_the_time() -> None:
    ((spec, agent),) = [(spec, agent) for spec, agent in agents() if agent in spec.get("initContainers", ())]
    assert agent["restartPolicy"] == "Always"
    (linger,) = [int(a.partition("=")[2]) for a in agent["args"] if a.startswith("--linger=")]
    assert linger == 25
    # After it the archive may take 20 s more.
    assert spec["terminationGracePeriodSeconds"] >= linger + 20


def test_trainers_write_where_the_agent_reads() -> None:
    trainers = 0
    for _, document in manifests():
        for spec in pod_specs(document):
            for container in spec["containers"]:
                if container["image"].startswith("gradmon-agent"):
                    continue
                trainers += 1
                environment = {variable["name"]: variable.get("value") for variable in container["env"]}
                assert environment["GRADMON_AGENT"] == "off"
                (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == environment["GRADMON_DIR"]]
                (volume,) = [v for v in spec["volumes"] if v["name"] == mount["name"]]
                if "hostPath" in volume:
                    assert volume["hostPath"]["path"] == "/var/lib/gradmon"
                    assert spec["securityContext"]["supplementalGroups"] == [GROUP]  # a hostPath heeds no fsGroup
                else:
                    assert volume["emptyDir"] == {}
                    assert spec["securityContext"]["fsGroup"] == GROUP
    assert trainers == 4


def test_monitors_and_policies_find_the_agents_port() -> None:
    pods = []
    for _, document in manifests():
        for mapping in walk(document):
            if "containers" in mapping.get("spec", {}):
                ports = {p["name"] for c in containers(mapping["spec"]) for p in c.get("ports", ())}
                pods.append((mapping.get("metadata", {}).get("labels", {}), ports))
    seen = 0
    for document in of_kind("PodMonitor") + of_kind("NetworkPolicy"):
        spec = document["spec"]
        labels = spec.get("selector", spec.get("podSelector"))["matchLabels"]
        names = {e["port"] for e in spec.get("podMetricsEndpoints", ())}
        names |= {p["port"] for rule in spec.get("ingress", ()) for p in rule.get("ports", ())}
        matching = [ports for pod, ports in pods if labels.items() <= pod.items()]
        assert matching
        assert all(names <= ports for ports in matching)
        seen += 1
    assert seen == 4


# --- labels of the targets --------------------------------------------------------------------------------------------


def relabelled(rules: list[dict[str, Any]], labels: dict[str, str]) -> dict[str, str]:
    """What Prometheus makes of the labels, for the actions used here."""
    labels = dict(labels)
    for rule in rules:
        regex = re.compile(rule.get("regex", "(.*)"))
        if rule["action"] == "labeldrop":
            labels = {name: value for name, value in labels.items() if not regex.fullmatch(name)}
            continue
        assert rule["action"] == "replace"
        value = rule.get("separator", ";").join(labels.get(name, "") for name in rule.get("sourceLabels", ()))
        match = regex.fullmatch(value)
        if match:
            labels[rule["targetLabel"]] = match.expand(re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1")))
    return {name: value for name, value in labels.items() if not name.startswith("__")}


def monitor(name: str) -> dict[str, Any]:
    (endpoint,) = next(m for m in of_kind("PodMonitor") if m["metadata"]["name"] == name)["spec"]["podMetricsEndpoints"]
    return endpoint


DISCOVERED = {
    "job": "gradmon/gradmon-agent",
    "namespace": "gradmon",
    "pod": "gradmon-agent-x7k2p",
    "container": "agent",
    "endpoint": "metrics",
    "instance": "10.0.0.7:10855",
    "__meta_kubernetes_pod_node_name": "node7",
}
POD = "__meta_kubernetes_pod_label_"


def test_a_daemonsets_target_is_its_node() -> None:
    endpoint = monitor("gradmon-agent")
    target = relabelled(endpoint["relabelings"], DISCOVERED)
    assert target == {"job": "gradmon", "cluster": "main", "namespace": "gradmon", "instance": "node7"}
    series = {"__name__": "gradmon_rank_info", "run": "a", "rank": "3", **target}
    with_host = relabelled(endpoint["metricRelabelings"], {**series, "host": "llama-7b-0"})
    assert with_host["host"] == "node7"
    assert "host" not in relabelled(endpoint["metricRelabelings"], series)


@pytest.mark.parametrize(
    ("labels", "instance"),
    [
        ({"batch_kubernetes_io_job_name": "a-b", "batch_kubernetes_io_job_completion_index": "3"}, "a-b-3"),
        (
            {
                "training_kubeflow_org_job_name": "llama",
                "training_kubeflow_org_replica_type": "worker",
                "training_kubeflow_org_replica_index": "12",
            },
            "llama-worker-12",
        ),
        ({}, "10.0.0.7:10855"),
    ],
    ids=["indexed job", "PyTorchJob", "another pod"],
)
def test_a_sidecars_target_is_its_job_and_index(labels: dict[str, str], instance: str) -> None:
    discovered = {**DISCOVERED, **{POD + name: value for name, value in labels.items()}}
    target = relabelled(monitor("gradmon-sidecar")["relabelings"], discovered)
    assert target == {"job": "gradmon", "cluster": "main", "namespace": "gradmon", "instance": instance}


# --- kustomize --------------------------------------------------------------------------------------------------------


def build(kubectl: str, folder: Path) -> list[Any]:
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds(kubectl: str, overlay: str) -> None:
    folder = KUBERNETES / "overlays" / overlay
    built = build(kubectl, folder)
    given = [document for _, document in kustomized(folder)]
    dashboards = [d for d in built if d["kind"] == "ConfigMap"]
    assert len(dashboards) == 5
    for document in dashboards:
        assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
        (content,) = document["data"].values()
        assert json.loads(content)["uid"].startswith("gradmon-")
        assert len(json.dumps(document)) < 1 << 20  # what a ConfigMap may hold
    assert sorted(d["kind"] for d in built if d not in dashboards) == sorted(d["kind"] for d in given)
    for document in built:
        assert document["metadata"]["labels"]["release"] == "kube-prometheus-stack"
        if overlay == "daemonset" and document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "gradmon"
    rules = {d["metadata"]["name"] for d in built if d["kind"] == "PrometheusRule"}
    assert len(rules) == (2 if overlay == "daemonset" else 1)
    for spec in (spec for document in built for spec in pod_specs(document)):
        assert {c["image"] for c in containers(spec)} == {"gradmon-agent:0.1.0"}


def test_the_components_change_the_daemonset(kubectl: str, tmp_path: Path) -> None:
    folder = KUBERNETES / "overlays/daemonset"
    # A kustomization refers to others by relative paths only.
    relative = [("../" * 20) + str(path).lstrip("/") for path in (folder, *COMPONENTS)]
    content = {"resources": relative[:1], "components": relative[1:]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    built = build(kubectl, tmp_path)
    (daemonset,) = [document for document in built if document["kind"] == "DaemonSet"]
    kubernetes_validate.validate(daemonset, NEWEST, strict=True)
    spec = daemonset["spec"]["template"]["spec"]
    assert spec["runtimeClassName"] == "nvidia"
    environment = {variable["name"]: variable.get("value") for variable in spec["containers"][0]["env"]}
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    (archive,) = [volume for volume in spec["volumes"] if volume["name"] == "archive"]
    assert archive["persistentVolumeClaim"]["claimName"] in [
        document["metadata"]["name"] for document in built if document["kind"] == "PersistentVolumeClaim"
    ]
    assert "hostPath" not in archive
    assert "gradmon-archive" not in "".join(spec["initContainers"][0]["command"])


# --- the examples' commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["indexed-job.yaml", "indexed-job-sidecar.yaml"])
@pytest.mark.parametrize("index", ["0", "1"])
def test_torchrun_accepts_the_jobs_command(name: str, index: str, tmp_path: Path) -> None:
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    manifest = {document["kind"]: document for document in documents(KUBERNETES / "examples" / name)}
    job = manifest["Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_UID": "u-1", "POD_IP": "10.0.0.7"}
    lines = subprocess.check_output(
        ["bash", "-c", *container["args"]], env={**environment, "JOB_COMPLETION_INDEX": index}, text=True
    )
    args = parse_args(lines.splitlines())
    assert args.training_script == "train.py"
    assert int(args.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(args.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (args.rdzv_backend, args.rdzv_id, args.local_addr) == ("c10d", "u-1", "10.0.0.7")
    assert args.rdzv_conf == f"is_host={'true' if index == '0' else 'false'}"
    service = manifest["Service"]
    host, _, port = args.rdzv_endpoint.partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert int(port) in [p["port"] for p in service["spec"]["ports"]]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}


def test_the_pytorchjob_is_what_its_operator_expects() -> None:
    (job,) = documents(KUBERNETES / "examples/pytorchjob.yaml")
    assert job["apiVersion"] == "kubeflow.org/v1"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"][0] == "torchrun"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
