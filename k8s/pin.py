"""Print the installed version of everything that pyproject.toml asks for.

``python k8s/pin.py > k8s/constraints.txt`` is what the image is built with, and ``python k8s/pin.py dev >
tests/constraints.txt`` (the same with that extra) is what ``make setup`` installs.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

HEADER = """\
# Everything that onepass-saliency depends on, at the versions that it was tested with.  Written by k8s/pin.py.
# What the target gpu of the image adds, TensorRT above all, is in k8s/constraints-gpu.txt.
"""


PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def collect(text: str, extras: tuple[str, ...], versions: dict[str, str], seen: set[tuple[str, str]]) -> None:
    """Add what the requirement ``text`` of a distribution with ``extras`` needs, and all that this needs, to ``versions``."""
    needed = Requirement(text)
    if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras or ("",)):
        return
    name = re.sub(r"[-_.]+", "-", needed.name).lower()
    if (name, str(needed.extras)) in seen:
        return
    seen.add((name, str(needed.extras)))
    distribution = importlib.metadata.distribution(needed.name)
    versions[name] = distribution.version
    for further in distribution.requires or []:
        collect(further, tuple(sorted(needed.extras)), versions, seen)


if __name__ == "__main__":
    found: dict[str, str] = {}
    already: set[tuple[str, str]] = set()
    project = tomllib.loads(PROJECT.read_text())["project"]
    for dependency in [
        *project["dependencies"],
        *(d for e in sys.argv[1:] for d in project["optional-dependencies"][e]),
    ]:
        collect(dependency, (), found, already)
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(found.items())))
