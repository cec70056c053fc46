"""Every command line in the manifests is one that the programs take, and every path in it is one that the pod has."""

from __future__ import annotations

import ast
import os
import re
import shlex
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from pipeline.train import parse_workers
from serving.config import ServiceConfig
from tests.k8s._manifests import ISTIO_DEFAULTS, K8S, Object, Pod, build, clusters, find, pods
from tests.k8s._policy import broken
from tests.k8s._rules import RULES
from tests.k8s._rules_of_network import api_servers

README = (K8S / "README.md").read_text()


def entrypoints(objects: list[Object]) -> Iterator[tuple[str, list[str], Pod]]:
    """(where, words, pod that runs them)."""
    heads = {pod.where: pod for pod in pods(objects) if pod.role == "head"}
    for where, spec, _ in clusters(objects):
        if "entrypoint" in spec:
            yield where, shlex.split(spec["entrypoint"]), heads[f"{where} head"]
    for pod in pods(objects):
        for container in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
            words = [*container.get("command", []), *container.get("args", [])]
            if words[:1] == ["python"]:
                yield f"{pod.where} {container['name']}", words, pod


def parsed(words: list[str]) -> Namespace:
    """The arguments of ``python -m MODULE ...``, as the module's own parser reads them."""
    assert words[:2] == ["python", "-m"], words
    return import_module(words[2]).parser().parse_args(words[3:])


def test_command_lines_are_parsed_by_the_programs(objects: list[Object]) -> None:
    modules = set()
    for where, words, _ in entrypoints(objects):
        if words[1] == "-c":
            ast.parse(words[2])
            continue
        if words[1].endswith(".py"):  # `test_fetch.py` runs it
            assert words[1] == "/scripts/transfer.py" and len(words) == 4, where
            continue
        arguments = parsed(words)
        modules.add(words[2])
        if words[2] == "pipeline.train":
            assert isinstance(parse_workers(arguments.workers), tuple), where
    assert modules >= {"pipeline.train", "serving.batch"}
    assert modules & {"export.onnx", "export.trt"}


def test_paths_of_commands_are_mounted(objects: list[Object]) -> None:
    for where, words, pod in entrypoints(objects):
        mounted = {
            mount["mountPath"]
            for container in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]
            for mount in container["volumeMounts"]
        }
        for path in re.findall(r"(?<![\w:/])/[a-z][\w./-]*", " ".join(words)):
            assert any(path == place or path.startswith(f"{place}/") for place in mounted), f"{where}: {path}"


def test_stages_hand_over_to_each_other(objects: list[Object]) -> None:
    """What training writes is what export reads, and what export writes is what scoring and the service read."""
    train = parsed(shlex.split(find(objects, "RayJob", "train")["spec"]["entrypoint"]))
    export = find(objects, "Job", "export")["spec"]["template"]["spec"]
    batch = parsed(shlex.split(find(objects, "RayJob", "batch")["spec"]["entrypoint"]))
    serve = find(objects, "RayService", "serve")["spec"]
    application = yaml.safe_load(serve["serveConfigV2"])["applications"][0]["args"]

    source, target = (export[key][0]["env"][0]["value"] for key in ("initContainers", "containers"))
    assert source.removeprefix("file://") == f"{train.out}/bundle"
    words = export["initContainers"][1]["args"]
    engine = Path(words[words.index("--out") + 1]).name
    assert batch.engine == application["engine"] == f"/models/{engine}"
    readers = [pod for pod in pods(objects) if pod.role in ("head", "worker") and "batch" in pod.where]
    readers += [pod for pod in pods(objects) if pod.role in ("head", "worker") and "serve" in pod.where]
    assert {pod.spec["initContainers"][0]["env"][0]["value"] for pod in readers} == {target}


def serve_config(objects: list[Object]) -> dict[str, Any]:
    return yaml.safe_load(find(objects, "RayService", "serve")["spec"]["serveConfigV2"])


def test_planted_data_is_what_the_local_jobs_read(overlays: dict[str, list[Object]], tmp_path: Path) -> None:
    """The job of the overlay local, run with fewer pictures, on a volume of the test."""
    objects = overlays["local"]
    (container,) = find(objects, "Job", "data")["spec"]["template"]["spec"]["containers"]
    (code,) = container["args"]
    few = re.sub(r"(per_class_\w+)=\d+", r"\1=1", code).replace("/store/", f"{tmp_path}/")
    assert container["command"] == ["python", "-c"] and few.count("=1,") + few.count("=1)") == 2
    exec(compile(few, "data", "exec"), {})
    train = find(objects, "RayJob", "train")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    batch = parsed(shlex.split(find(objects, "RayJob", "batch")["spec"]["entrypoint"]))
    read = {train["initContainers"][0]["env"][0]["value"].removeprefix("file://"), batch.input}
    (folder,) = (Path(place.replace("/store/", f"{tmp_path}/")) for place in read)
    assert list(folder.glob("train/*/*")) and list(folder.glob("val/*/*"))


def test_serve_config_fits_serve_and_the_application(objects: list[Object]) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(objects)
    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.port == 8000
    (application,) = schema.applications
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(import_module(module), function))
    settings = ServiceConfig.model_validate(application.args)
    worker = find(objects, "RayService", "serve")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    # One replica fills one node, so that nodes follow replicas.
    assert settings.cpus == int(limits["cpu"])
    assert settings.gpus == int(limits.get("nvidia.com/gpu", 0))


def test_batch_workers_fit_their_nodes(objects: list[Object]) -> None:
    """Ray would wait without a word for a worker that fits nowhere."""
    job = find(objects, "RayJob", "batch")["spec"]
    flags = parsed(shlex.split(job["entrypoint"]))
    limits = {
        group["groupName"]: (group["replicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"])
        for group in job["rayClusterSpec"]["workerGroupSpecs"]
    }
    _, worker = next(iter(limits.values()))
    assert flags.cpus_per_worker <= int(worker["cpu"])
    assert (flags.num_gpus or 0) <= int(worker.get("nvidia.com/gpu", 0))
    nodes, decoder = limits.get("decode", (0, {"cpu": "0"}))
    assert flags.decode_cpus == nodes * int(decoder["cpu"])


def test_commands_of_the_readme_are_parsed() -> None:
    text = README.replace("\\\n", " ")
    commands = [line for line in re.findall(r"python -m [a-z.]+ [^\n`|]*", text) if "--" in line]
    assert commands
    for command in commands:
        parsed(shlex.split(command))


def test_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"(?<!tests/)\bk8s/[\w./-]*\w", README))
    tests = {
        name if "/" in name else f"tests/k8s/{name}" for name in re.findall(r"(?:tests/\w+/)?test_\w+\.py", README)
    }
    for path in named | tests:
        assert "/mine" in path or (K8S.parent / path).exists(), path


def test_readme_installs_what_it_needs() -> None:
    """KubeRay from a repository that was added, at a fixed version; a log is followed once its pod can be there."""
    lines = [line.strip() for line in README.splitlines()]
    added = lines.index("helm repo add kuberay https://ray-project.github.io/kuberay-helm/")
    (install,) = [n for n, line in enumerate(lines) if line.startswith("helm install kuberay-operator kuberay/")]
    assert added < install and re.search(r" --version \d+\.\d+\.\d+ ", lines[install])
    for n, line in enumerate(lines):
        if "logs -f" in line:
            assert "kubectl -n onepass wait" in lines[n - 1], line
    assert f"kubectl apply -f {ISTIO_DEFAULTS.relative_to(K8S.parent)}" in README


def test_readme_names_every_place_of_the_engine() -> None:
    upgrade = README[README.index("* **A new engine**") : README.index("* **A new image**")]
    for path in sorted((K8S / "base").glob("*.yaml")):
        assert ("engines/v1" in path.read_text()) == (f"k8s/base/{path.name}" in upgrade), path.name


def test_readme_sets_every_rule_against_a_threat() -> None:
    table = README[README.index("| threat | control | test |") : README.index("What remains:")]
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", table))
    assert RULES.keys() <= named, RULES.keys() - named


def test_overlay_of_the_readme_keeps_the_rules(tmp_path: Path) -> None:
    """The example of step 3, with a registry, a digest and an API server filled in."""
    start = README.index("       apiVersion: kustomize.config.k8s.io/v1beta1")
    text = textwrap.dedent(README[start : README.index("\n\n", start)])
    text = text.replace("../gpu", f"{os.path.relpath(K8S, tmp_path)}/overlays/gpu")
    text = text.replace("<registry>", "registry.example.org").replace("<digest>", "0" * 64)
    (tmp_path / "kustomization.yaml").write_text(text.replace("<address>", "10.96.0.1"))
    objects = build(tmp_path)
    assert broken(objects) == {}
    assert api_servers(objects) == ["10.96.0.1/32"]
    assert {container["image"] for pod in pods(objects) if pod.ours for container in pod.containers} == {
        f"registry.example.org/onepass-saliency@sha256:{'0' * 64}"
    }
