"""The register of security rules: each a function from built objects to what breaks it, with where."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.k8s._manifests import Object, Pod, pods

Rule = Callable[[list[Object]], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


def containers(objects: list[Object]) -> Iterator[tuple[Pod, str, Object]]:
    for pod in pods(objects):
        for container in pod.containers:
            yield pod, f"{pod.where} {container['name']}", container
