"""Every command line in the manifests is one that the programs take, and every path in it is one that the pod has."""

from __future__ import annotations

import ast
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from pipeline.train import parse_workers
from serving.config import ServiceConfig
from tests.k8s._manifests import K8S, Object, Pod, clusters, find, pods


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
    text = (K8S / "README.md").read_text().replace("\\\n", " ")
    commands = [line for line in re.findall(r"python -m [a-z.]+ [^\n`|]*", text) if "--" in line]
    assert commands
    for command in commands:
        parsed(shlex.split(command))


def test_readme_names_files_that_exist() -> None:
    text = (K8S / "README.md").read_text()
    for path in set(re.findall(r"(?<!tests/)\bk8s/[\w./-]*\w", text)) | {
        f"tests/k8s/{n}" for n in re.findall(r"test_\w+\.py", text)
    }:
        assert "/mine" in path or (K8S.parent / path).exists(), path
