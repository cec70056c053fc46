"""The built overlays, once for all tests."""

from __future__ import annotations

import pytest

from tests.k8s._manifests import K8S, OVERLAYS, Object, build


@pytest.fixture(scope="session")
def overlays() -> dict[str, list[Object]]:
    """The objects of each overlay."""
    return {name: build(K8S / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="session", params=OVERLAYS)
def objects(request: pytest.FixtureRequest, overlays: dict[str, list[Object]]) -> list[Object]:
    """The objects of one overlay after the other."""
    return overlays[request.param]
