"""The Dockerfile, linted, read as its builder would, and held against the rules for images."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.k8s._manifests import K8S, OVERLAYS, Object, clusters, pods

TARGETS = ("cpu", "gpu")
COMPILERS = re.compile(r"\b(gcc|g\+\+|clang|build-essential|make|cmake|nvcc|cuda-toolkit|python3?-dev|libc6-dev)\b")
KNOWN = {
    "FROM",
    "RUN",
    "COPY",
    "ADD",
    "ENV",
    "ARG",
    "USER",
    "WORKDIR",
    "LABEL",
    "ENTRYPOINT",
    "CMD",
    "EXPOSE",
    "VOLUME",
    "SHELL",
    "HEALTHCHECK",
}


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages(text: str) -> dict[str, Stage]:
    """The stages by name; instructions with their continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\\n", " ", text)
    found: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        assert word in KNOWN, line
        if word == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", rest)
            assert match, f"a stage without a name: {line}"
            found[match[2]] = current = Stage(match[2], match[1])
        elif found:
            current.steps.append((word, rest.strip()))
    return found


def _built(found: dict[str, Stage], copies: list[str]) -> list[tuple[str, str]]:
    """The steps of the stages that ``copies`` take files from."""
    names = [match[1] for value in copies if (match := re.search(r"--from=(\S+)", value))]
    return [step for name in names if name in found for step in found[name].steps]


def lint(text: str) -> set[str]:
    """The rules that a Dockerfile breaks."""
    broken: set[str] = set()
    if re.search(r"^\s*HEALTHCHECK", text, re.MULTILINE):
        broken.add("no-healthcheck")
    if re.search(r"\b[\w-]+(\.[\w-]+)+(:\d+)?/", " ".join(re.findall(r"^(?:FROM|ARG) .*$", text, re.MULTILINE))):
        broken.add("no-registry-host")
    if re.search(r"(curl|wget)[^\n|]*\|\s*(ba)?sh|^ADD http", text, re.MULTILINE):
        broken.add("nothing-piped-to-a-shell")
    found = stages(text)
    for target in TARGETS:
        chain = [found[target]]
        while chain[-1].base in found:
            chain.append(found[chain[-1].base])
        steps = [step for stage in reversed(chain) for step in stage.steps]
        users = [value for word, value in steps if word == "USER"]
        if not users or users[-1] != "1000:1000":
            broken.add("user-1000")
        if any(word == "RUN" and COMPILERS.search(value) for word, value in steps):
            broken.add("no-compiler")
        copies = [value for word, value in steps if word == "COPY"]
        if not any("--from=" in value for value in copies):
            broken.add("multi-stage")
        if any(re.search(r"safetensors|\.onnx|\.plan|\.pt\b|runs|\.env", value) for _, value in steps):
            broken.add("no-weights")
        if any("--from=" not in value for value in copies):
            broken.add("nothing-but-the-build")
        if any(word == "RUN" and "apt-get install" in v and "--no-install-recommends" not in v for word, v in steps):
            broken.add("no-recommends")
        if any(re.search(r"TOKEN|PASSWORD|SECRET", value) for word, value in steps if word in ("ENV", "ARG")):
            broken.add("no-secrets")
        if any("NVIDIA_VISIBLE_DEVICES" in value for word, value in steps if word == "ENV"):
            broken.add("gpus-on-request")
        installs = [v for w, v in _built(found, copies) if w == "RUN" and "pip install" in v]
        if any(not re.search(r"constraints|cpu\.txt|--no-deps", value) for value in installs):
            broken.add("packages-pinned")
    for stage in found.values():
        if stage.base not in found and stage.base != "${PYTHON_IMAGE}":
            broken.add("one-base")
    default = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)
    if not default or ":" not in default[1] or default[1].endswith(":latest"):
        broken.add("base-pinned")
    return broken


TEXT = (K8S / "Dockerfile").read_text()


def test_dockerfile_keeps_the_rules() -> None:
    assert lint(TEXT) == set()


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("user-1000", "USER 1000:1000", "USER root"),
        ("user-1000", "USER 1000:1000\n", ""),
        ("no-healthcheck", "USER 1000:1000", "USER 1000:1000\nHEALTHCHECK CMD true"),
        ("no-compiler", "--no-install-recommends wget", "--no-install-recommends wget gcc"),
        ("multi-stage", "COPY --from=build-cpu /opt/onepass /opt/onepass", "RUN pip install onepass-saliency"),
        ("no-weights", "FROM runtime AS cpu\n", "FROM runtime AS cpu\nCOPY --from=build model.safetensors /models/\n"),
        ("nothing-but-the-build", "FROM runtime AS cpu\n", "FROM runtime AS cpu\nCOPY . /app\n"),
        ("no-recommends", "--no-install-recommends wget", "wget"),
        ("no-registry-host", "=python:3.11", "=registry.example.org/python:3.11"),
        ("base-pinned", "=python:3.11-slim-bookworm", "=python:latest"),
        ("no-secrets", "RAY_USAGE_STATS_ENABLED=0", "RAY_AUTH_TOKEN=x"),
        ("gpus-on-request", "ENV NVIDIA_DRIVER", "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER"),
        ("packages-pinned", "-c constraints.txt -c constraints-gpu.txt '.[tensorrt]'", "'.[tensorrt]'"),
        ("nothing-piped-to-a-shell", "RUN python -m venv /opt/onepass", "RUN curl -s https://x | sh"),
        ("one-base", "FROM ${PYTHON_IMAGE} AS runtime", "FROM debian AS runtime"),
    ],
)
def test_mutated_dockerfile_is_caught(rule: str, old: str, new: str) -> None:
    assert old in TEXT
    assert lint(TEXT.replace(old, new)) == {rule}


def hadolint(text: str) -> str:
    """What hadolint finds in a Dockerfile; the development tools bring it along."""
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=30)
    assert done.stdout or done.returncode == 0, done.stderr
    return done.stdout


def test_dockerfile_is_clean_for_hadolint() -> None:
    assert hadolint(TEXT) == ""


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        ("DL3002", "USER 1000:1000", "USER root"),
        ("DL3006", "FROM ${PYTHON_IMAGE} AS runtime", "FROM python AS runtime"),
        ("DL3009", "    && rm -rf /var/lib/apt/lists/* \\\n", ""),
        ("DL3013", "-r constraints.txt", "tensorrt"),
        ("DL4006", "> torch.txt", "| cat > torch.txt"),
    ],
)
def test_hadolint_catches_a_mutated_dockerfile(code: str, old: str, new: str) -> None:
    assert old in TEXT
    assert code in hadolint(TEXT.replace(old, new))


def test_image_is_built_of_what_is_there() -> None:
    """Each file that is copied from the repository exists, and the ignore file lets it through."""
    allowed = set(re.findall(r"^!(\S+)$", (K8S / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    copied = set()
    for stage in stages(TEXT).values():
        for word, value in stage.steps:
            if word == "COPY" and "--from=" not in value:
                copied |= set(value.split()[:-1])
    assert copied == allowed
    assert all((K8S.parent / path).exists() for path in copied)


def test_versions_agree(objects: list[Object]) -> None:
    """The Ray in the image is the one that KubeRay is told of, and the image is called after the package's version."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (K8S / "constraints.txt").read_text(), re.MULTILINE))
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]
    assert {cluster["rayVersion"] for _, _, cluster in clusters(objects)} == {pins["ray"]}
    image = {container["image"] for pod in pods(objects) if pod.ours for container in pod.containers}
    assert image in ({f"onepass-saliency:{project['version']}-{target}"} for target in TARGETS)


@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (["k8s/constraints.txt"], ()),
        (["k8s/constraints.txt", "k8s/constraints-gpu.txt"], ("tensorrt",)),
        (["tests/constraints.txt"], ("dev",)),
    ],
)
def test_constraints_hold_every_dependency(files: list[str], extras: tuple[str, ...]) -> None:
    text = "".join((K8S.parent / file).read_text() for file in files)
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"}):
            assert requirement.name in pins, f"{requirement.name} is not in {files}"
            assert requirement.specifier.contains(pins[requirement.name]), text


def test_every_overlay_is_there() -> None:
    assert {folder.name for folder in (K8S / "overlays").iterdir()} == set(OVERLAYS)
    assert not [file for file in Path(K8S).rglob("*") if file.suffix in {".safetensors", ".onnx", ".pem", ".key"}]
