"""Each security rule holds for every overlay, and each is broken by a manifest that somebody might write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.k8s._manifests import Object, clusters, find, mixed, pods
from tests.k8s._mutations import MUTATIONS, caught_by
from tests.k8s._policy import broken
from tests.k8s._rules import RULES


def test_rules_hold(objects: list[Object]) -> None:
    assert broken(objects) == {}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_manifest_is_caught(name: str, overlays: dict[str, list[Object]]) -> None:
    mutation = MUTATIONS[name]
    assert caught_by(mutation, overlays[mutation.overlay]) == {mutation.rule}


def test_every_rule_has_a_mutation() -> None:
    assert {mutation.rule for mutation in MUTATIONS.values()} == RULES.keys()


@pytest.mark.parametrize(
    ("overlay", "components"),
    [
        ("spot", ["s3-keys", "kueue", "pod-identity"]),
        ("local", ["gateway", "monitoring", "s3-keys", "kueue", "pod-identity"]),
        ("local", ["gateway", "s3-keys"]),
    ],
)
def test_components_keep_the_rules_when_mixed(overlay: str, components: list[str], tmp_path: Path) -> None:
    """All that a user may add, on the overlays that have most and least."""
    objects = mixed(tmp_path, overlay, *components)
    assert broken(objects) == {}
    if "kueue" in components:
        queue = find(objects, "LocalQueue", "onepass")["metadata"]["name"]
        for name in ("train", "batch"):
            job = find(objects, "RayJob", name)
            assert job["spec"]["suspend"] is True
            assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue
            assert not job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")
        assert not [where for where, _, _ in clusters(objects) if "RayCronJob" in where], "it would run past the quota"


def test_ray_knows_the_settings_of_its_pods(overlays: dict[str, list[Object]]) -> None:
    """Ray ignores an environment variable that it does not know."""
    from ray._private import ray_constants
    from ray.serve._private import constants

    texts = [Path(str(module.__file__)).read_text() for module in (ray_constants, constants)]
    read = set(re.findall(r'"(RAY_\w+)"', "".join(texts)))
    named = {
        env["name"]
        for objects in overlays.values()
        for pod in pods(objects)
        for container in pod.containers
        for env in container.get("env", [])
        if env["name"].startswith("RAY_")
    }
    assert named and named <= read
