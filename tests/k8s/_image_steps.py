"""Run every step of the Dockerfile in a root file system, without a container engine.

``python -m tests.k8s._image_steps ROOT`` takes about ten minutes and 15 GB beside ROOT, and needs to be root.  ROOT is made
with ``debootstrap`` (Debian 12 with its own Python 3.11) where it does not exist yet, and stands in for the image
``python:3.11-slim-bookworm``.  Each stage is an overlay on the one before, as in an image, and each RUN is done as it stands,
in a chroot.  The target gpu finds the packages that both targets have in this environment, and TensorRT is left out of it,
whose libraries come from NVIDIA's index.

The image cpu is then used as a pod uses it: by user 1000, without capabilities or new privileges, on a read-only root.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

from tests.k8s._manifests import K8S
from tests.k8s.test_image import TEXT, Stage, stages
from tests.k8s.test_on_ray import free_port

REPOSITORY = K8S.parent
PACKAGES = Path(sysconfig.get_path("purelib"))
DEBIAN = ["--variant=minbase", "--include=python3-venv,python-is-python3,ca-certificates", "bookworm"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NVIDIA = "'.[tensorrt]'"
SEAL = "setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all"


def do(*words: str | Path, **options: object) -> str:
    """Run a command; its output, or an error with it."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{shlex.join(str(w) for w in words)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


class Image:
    """The stages that were run, each a mounted root file system under ``folder``."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.stages = stages(TEXT)
        self.layers: dict[str, list[Path]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.folders: dict[str, str] = {}

    def root(self, name: str) -> Path:
        """The root file system of a stage, whose steps are run when it is asked for first."""
        place = self.folder / name / "root"
        if name not in self.layers:
            stage = self.stages[name]
            below, environment, self.folders[name] = [self.base], {"PATH": PATH, "HOME": "/root"}, "/"
            if stage.base in self.stages:
                self.root(stage.base)
                below, environment = self.layers[stage.base], self.environments[stage.base]
                self.folders[name] = self.folders[stage.base]
            upper = self.folder / name / "layer"
            for path in (place, upper, self.folder / name / "work"):
                path.mkdir(parents=True)
            lower = ":".join(str(layer) for layer in below)
            do("mount", "-t", "overlay", "overlay", place, "-o", f"lowerdir={lower},upperdir={upper},workdir={path}")
            self.layers[name] = [upper, *below]
            self.environments[name] = self._run(stage, place, dict(environment))
        return place

    def _run(self, stage: Stage, root: Path, environment: dict[str, str]) -> dict[str, str]:
        """Run the steps of a stage in its root; returns the environment for those after it."""
        _add_devices(root)
        if stage.name == "build-gpu":
            library = next((root / "opt/onepass").glob("lib/python*/site-packages"))
            (library / "host.pth").write_text("/host\n")
        folder = self.folders[stage.name]
        certificates = os.environ.get("PIP_CERT")
        for word, value in stage.steps:
            print(f"{stage.name}: {word} {value}", flush=True)
            if word in ("ENV", "ARG"):
                for name, _, text in (pair.partition("=") for pair in shlex.split(value)):
                    environment[name] = text.replace("${PATH}", environment["PATH"])
            elif word == "WORKDIR":
                folder = self.folders[stage.name] = value
                (root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self._copy(value, root, root / folder.lstrip("/"))
            elif word == "RUN":
                here = dict(environment)
                if certificates:  # of this network, and not of the image
                    shutil.copy(certificates, root / "tmp/certificates.pem")
                    here["PIP_CERT"] = "/tmp/certificates.pem"
                value = self._without_tensorrt(value)
                do("chroot", root, "/bin/sh", "-c", f"cd {folder} && {value}", env=here)
        return environment

    def _without_tensorrt(self, value: str) -> str:
        if NVIDIA not in value:
            return value
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        rest = [shlex.quote(text) for text in extras["tensorrt"] if not text.startswith("tensorrt")]
        print(f"NOT RUN: {set(extras['tensorrt']) - {shlex.split(r)[0] for r in rest}} of {NVIDIA}", flush=True)
        return value.replace(NVIDIA, " ".join([".", *rest]))

    def _copy(self, value: str, root: Path, folder: Path) -> None:
        if match := re.match(r"--from=(\S+) (\S+) (\S+)$", value):
            do("cp", "-a", self.root(match[1]) / match[2].lstrip("/"), root / match[3].lstrip("/"))
            return
        *sources, target = value.split()
        for source in sources:
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPOSITORY / source, folder / target)


def _add_devices(root: Path) -> None:
    """What a container engine mounts into a root, nothing of it this machine's own, and this environment's packages."""
    for name in ("hosts", "resolv.conf"):
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    (root / "host").mkdir(exist_ok=True)
    do("mount", "--bind", PACKAGES, root / "host")
    do("mount", "-o", "remount,bind,ro", root / "host")
    do("mount", "-t", "proc", "proc", root / "proc")
    do("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "dev")
    (root / "dev/shm").mkdir(mode=0o1777)
    (root / "dev/shm").chmod(0o1777)
    (root / "dev/fd").symlink_to("/proc/self/fd")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / name).touch()
        do("mount", "--bind", f"/dev/{name}", root / "dev" / name)


def files(root: Path, package: str) -> set[str]:
    """What the program reads of a package under ``root``."""
    found = (path for path in (root / package).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(root)) for path in found if not path.name.startswith("README")}


AS_A_POD = r"""
set -ex
trap 'test $? = 0 || tail -n 20 /tmp/log' EXIT
test "$(id -u):$(id -g)" = 1000:1000
if touch /sealed 2>/dev/null; then echo "the root is writable"; exit 9; fi
for program in gcc cc g++ make ld as; do
  if command -v $program; then echo "a compiler is in the image"; exit 9; fi
done
test -z "$(find /opt/onepass -writable -not -type l -print -quit)"
cd /home/onepass
for module in pipeline.train export.onnx export.trt serving.batch; do python -m $module --help >/dev/null; done
python -c 'import serving.app'
# The head as KubeRay starts it, its probes, and a job as its submitter sends it.
bash -c 'ulimit -n 65536; ray start --head --num-cpus=0 --port=$GCS --dashboard-port=$DASHBOARD --metrics-export-port=$METRICS \
  --dashboard-agent-listen-port=$AGENT --ray-client-server-port=$CLIENT --object-store-memory=100000000 --block' >/tmp/log 2>&1 &
head=$!
probe() { wget --tries 1 -T 10 -q -O- http://localhost:$1 | grep -q success; }
for second in $(seq 120); do if probe $AGENT/api/local_raylet_healthz; then break; fi; sleep 1; done
probe $AGENT/api/local_raylet_healthz
probe $DASHBOARD/api/gcs_healthz
ray job submit --address http://127.0.0.1:$DASHBOARD -- python -c 'print("a job ran")' | grep "^a job ran"
if RAY_AUTH_TOKEN=wrong ray job list --address http://127.0.0.1:$DASHBOARD 2>/dev/null; then echo "any token does"; exit 9; fi
kill $head
"""


def use(image: Image) -> None:
    """The image cpu as the pods have it."""
    root, environment = image.root("cpu"), image.environments["cpu"]
    do("mount", "-o", "remount,ro", root)
    for place in ("tmp", "home/onepass"):
        do("mount", "-t", "tmpfs", "-o", "uid=1000,gid=1000,mode=1777", "tmpfs", root / place)
    ports = {name: str(free_port()) for name in ("GCS", "DASHBOARD", "METRICS", "AGENT", "CLIENT")}
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(), "HOME": "/home/onepass"}
    words = ["chroot", root, *SEAL.split(), "bash", "-c", AS_A_POD]
    print(do(*words, env=environment | secret | ports))


def build(base: Path, folder: Path) -> None:
    """All stages, in mounts of this process alone."""
    image = Image(base, folder)
    library = next((image.root("cpu") / "opt/onepass").glob("lib/python*/site-packages"))
    for package in ("pipeline", "export", "serving"):
        differ = files(library, package) ^ files(REPOSITORY, package)
        assert not differ, f"the image and the repository differ in {sorted(differ)}"
    use(image)
    image.root("gpu")
    print("all steps ran; the image has every file of the packages")


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m tests.k8s._image_steps ROOT")
    base = Path(sys.argv[1]).resolve()
    if len(sys.argv) == 3:
        return build(base, Path(sys.argv[2]))
    if not base.exists():
        do("debootstrap", *DEBIAN, base)
    folder = tempfile.mkdtemp(dir=base.parent)
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    try:
        done = subprocess.run([*own, sys.executable, "-m", "tests.k8s._image_steps", str(base), folder])
    finally:  # the mounts were the other process's, so these folders are all that there is
        do("rm", "-rf", "--one-file-system", folder)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
