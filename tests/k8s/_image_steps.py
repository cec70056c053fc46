"""Run the Dockerfile's build of the target cpu step by step, in a folder in place of a container's root.

``python -m tests.k8s._image_steps`` takes a minute or two.  Packages come from this environment where it has them at the versions
that the image asks for, and from the registry otherwise, so what was tested is what the image gets.  Not run, since they need
a container's root or NVIDIA's index: apt-get and useradd of the last stage, and the target gpu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from tests.k8s._manifests import K8S
from tests.k8s.test_image import TEXT, stages

REPOSITORY = K8S.parent


def run_steps(root: Path) -> Path:
    """Run the steps under ``root``; returns the folder of the installed packages.

    Raises:
        subprocess.CalledProcessError: a step failed.
    """
    place, work = root / "opt/onepass", root / "build"  # as the stage's venv and WORKDIR
    work.mkdir()
    environment = dict(os.environ)
    found = stages(TEXT)
    for word, value in [*found["build"].steps, *found["build-cpu"].steps]:
        value = value.replace("/opt/onepass", str(place))
        if word == "ENV":
            for name, _, text in (pair.partition("=") for pair in value.split()):
                environment[name] = text.replace("${PATH}", environment["PATH"])
        elif word == "COPY":
            *sources, target = value.split()
            for source in sources:
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(REPOSITORY / source, work / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(REPOSITORY / source, work / target)
        elif word == "RUN":
            print(f"RUN {value}", flush=True)
            subprocess.run(["/bin/sh", "-c", value], cwd=work, env=environment, check=True)
            if "-m venv" in value:
                library = next(place.glob("lib/python*/site-packages"))
                (library / "environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return next(place.glob("lib/python*/site-packages"))


def files(root: Path, package: str) -> set[str]:
    """What the program reads of a package under ``root``."""
    found = (path for path in (root / package).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(root)) for path in found if not path.name.startswith("README")}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = run_steps(Path(folder))
        for package in ("pipeline", "export", "serving"):
            differ = files(library, package) ^ files(REPOSITORY, package)
            assert not differ, f"the image and the repository differ in {sorted(differ)}"
    print("all steps ran; the image has every file of the packages")


if __name__ == "__main__":
    main()
