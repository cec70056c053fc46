"""The OpenAPI document against the running service: requests that it allows get the answers that it promises."""

from __future__ import annotations

from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving.running import TOKEN

EXAMPLES = 12
"""Requests of each kind, right and wrong, to each route."""


def test_the_document_is_kept_to(service: httpx.Client) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    schema = schemathesis.openapi.from_url(f"{service.base_url}/openapi.json", headers=headers)
    routes = [found.ok() for found in schema.get_all_operations()]
    assert len(routes) == len([1 for methods in schema.raw_schema["paths"].values() for _ in methods])
    failures: list[str] = []
    # Not whether the right is accepted: what an image is, and which places there are, no schema can say.
    for route in routes:
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=route.as_strategy(generation_mode=mode))
            def keeps(case: Any) -> None:
                answer = case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])
                assert "Traceback" not in answer.text

            try:
                keeps()
            except Unsatisfiable:  # a route that takes nothing can be asked nothing wrong
                assert mode is schemathesis.GenerationMode.NEGATIVE, route.label
            except Exception as error:
                failures.append(f"{route.label}: {error!r}")
    assert failures == []
