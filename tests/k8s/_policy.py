"""All security rules together, and which of them built objects break."""

from __future__ import annotations

from tests.k8s import _rules_of_access, _rules_of_network, _rules_of_pods, _rules_of_work
from tests.k8s._manifests import Object
from tests.k8s._rules import RULES

THEMES = (_rules_of_pods, _rules_of_access, _rules_of_work, _rules_of_network)
"""The modules whose import registers the rules."""


def broken(objects: list[Object]) -> dict[str, list[str]]:
    """The rules that are broken, with where."""
    found = {name: list(function(objects)) for name, function in RULES.items()}
    return {name: places for name, places in found.items() if places}
