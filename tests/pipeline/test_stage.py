"""What the class of a stage may look like."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage, references
from tests.pipeline.toys import Number, write


class Inner(BaseModel):
    number: Ref[Number] | None = None


class Deeper(BaseModel):
    inner: list[Inner] = []
    again: Deeper | None = None


def a_stage(annotation: Any) -> type[Stage]:
    def run(self: Stage, ctx: Context) -> Metrics:
        return write(ctx, 0)

    members = {"__annotations__": {"field": annotation}, "produces": Number, "run": run}
    return type("Made", (Stage,), {"__module__": __name__, **members})


@pytest.mark.parametrize(
    "annotation",
    [
        dict[str, Ref[Number]],
        dict[str, Ref[Number]] | None,
        list[list[Ref[Number]]],
        list[dict[str, Ref[Number]]],
        Inner,
        list[Inner],
        Deeper,
    ],
)
def test_references_that_nothing_would_track_are_refused(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"Made\.field: a reference in .* would be no input"):
        a_stage(annotation)


@pytest.mark.parametrize(
    ("annotation", "value", "found"),
    [
        (Ref[Number], "a", {"field": "a"}),
        (Ref[Number] | None, None, {}),
        (list[Ref[Number]], ["a", "b"], {"field.0": "a", "field.1": "b"}),
        (tuple[Ref[Number], ...] | None, ["a"], {"field.0": "a"}),
        (dict[str, int], {"a": 1}, {}),
    ],
)
def test_references_are_found(annotation: Any, value: Any, found: dict[str, str]) -> None:
    assert references(a_stage(annotation)(field=value)) == found
