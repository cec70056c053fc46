"""HTML pages from the templates of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, *, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """``templates/<template>`` with ``values``, escaped; a name that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)
