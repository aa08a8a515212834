"""What `scheme: auto` tries: partial settings of `quantize`, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lifecycle.evaluation.front import quality_metric
from lifecycle.evaluation.gates import METRICS, check_gates
from lifecycle.pipeline.problems import explain

if TYPE_CHECKING:
    from lifecycle.stages.quantize import Quantize

Settings = dict[str, Any]

AS_IS = "float32"
"""The model as it is."""

CANDIDATES: tuple[str | dict[str, Any], ...] = (
    AS_IS,
    {"scheme": "int8-rowwise", "weight_bits": 8},
    {"scheme": "int8-rowwise", "weight_bits": 7},
    {"scheme": "int8"},
    {"scheme": "int4", "block_size": 32, "int8": ["lm_head", "*.down_proj"]},
    {"scheme": "int4", "block_size": 64, "int8": ["lm_head", "*.down_proj"]},
    {"scheme": "int4", "block_size": 32},
    {"scheme": "int4", "block_size": 64},
    {"scheme": "int4", "block_size": 128},
    {"scheme": "int4", "block_size": 32, "method": "gptq"},
    {"scheme": "int4", "block_size": 32, "method": "gptq", "symmetric": False},
    {"scheme": "int4", "block_size": 64, "method": "gptq"},
    {"scheme": "int4", "block_size": 64, "int8": ["lm_head", "*.down_proj"], "method": "gptq"},
)
"""Tried where a recipe lists none. A new setting of `quantize` joins by a line."""

_BLOCKS = ("int4", "int8", "mixed")
"""Schemes that store weights in blocks."""
ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "method": _BLOCKS,
    "symmetric": _BLOCKS,
    "block_size": _BLOCKS,
    "weight_bits": ("int8-rowwise", "int4", "mixed", "int8-static"),
    "int8": ("int4",),
    "distill": ("int4", "mixed"),
    "smooth": ("int8-rowwise",),
    "calibrate": ("int8-static",),
    "percentile": ("int8-static",),
}
"""Settings that not every scheme reads."""

_FOR_SOME = ("weight_bits", "int8", "calibrate", "percentile")

SEARCH = frozenset({"bound", "objective", "batch", "data", "candidates", "eval_samples"})
"""Settings of `quantize` that are about the search itself."""
_NOT_LISTED = SEARCH | {"model", "calibration"}
_TEXTS = ("samples", "sample_length")
"""Settings that go with `calibration`: elsewhere they would only make another key."""


@dataclass(frozen=True)
class Candidate:
    """One way to store the model."""

    name: str
    """The scheme and what the list says besides, such as `int4, block_size 32`."""
    stage: Quantize | None
    """What makes it; None for the model as it is."""


def check_search(stage: Quantize) -> None:
    """Check the settings of a search, or that there are none where nothing is searched.

    Raises:
        ValueError: names the setting and the way out.
    """
    if stage.scheme != "auto":
        if given := sorted(stage.model_fields_set & SEARCH):
            raise ValueError(f"'{given[0]}' is for scheme auto, not for {stage.scheme}")
        return
    if stage.data is None:
        raise ValueError("scheme auto needs 'data', the texts that candidates are measured on")
    check_bound(stage.bound)
    candidates_of(stage)


def check_bound(bound: Mapping[str, str]) -> None:
    """Check what the chosen model must hold.

    Raises:
        ValueError: an unknown metric, a bound that cannot be read, or nothing about quality.
    """
    try:
        check_gates(bound, {metric.measure for metric in METRICS.values()}, has_reference=True)
    except ValueError as error:
        raise ValueError(f"bound: {error}") from error
    if quality_metric(bound) is None:
        raise ValueError(
            "bound: scheme auto needs a bound on what may be lost, such as "
            '{perplexity_ratio: "<= 1.01"} or {kl: "<= 0.01"}'
        )


def candidates_of(stage: Quantize) -> list[Candidate]:
    """What the search tries, each once, in the order of the list. Whatever else the stage sets
    (such as `skip`) holds for all of them.

    Raises:
        ValueError: an entry of the list is no settings of `quantize`.
    """
    given = {name: getattr(stage, name) for name in stage.model_fields_set - SEARCH - {"scheme"}}
    texts = {name: given.pop(name) for name in _TEXTS if name in given}
    texts["calibration"] = given.pop("calibration", None) or stage.data
    listed = CANDIDATES if stage.candidates is None else stage.candidates
    if not listed:
        raise ValueError("candidates: the list is empty; leave it out to try the usual ones")
    found: list[Candidate] = []
    for index, entry in enumerate(listed):
        settings = {"scheme": entry} if isinstance(entry, str) else entry
        bits = given.get("weight_bits")
        if stage.candidates is None and bits is not None and "weight_bits" in settings:
            settings = settings | {"weight_bits": bits}
        try:
            candidate = _candidate(type(stage), given, texts, settings)
        except ValueError as error:
            raise ValueError(f"candidates.{index}: {error}") from error
        if all(candidate.stage != other.stage for other in found):
            found.append(candidate)
    schemes = {candidate.stage.scheme for candidate in found if candidate.stage is not None}
    for key in _FOR_SOME:
        if key in given and schemes.isdisjoint(ONLY_FOR[key]):
            raise ValueError(
                f"{key} is for {', '.join(ONLY_FOR[key])}, and no candidate is one of them"
            )
    return found


def _candidate(
    cls: type[Quantize], common: Settings, texts: Settings, settings: Settings
) -> Candidate:
    if refused := sorted(settings.keys() & _NOT_LISTED):
        raise ValueError(f"'{refused[0]}' is set beside 'candidates', for all of them")
    if settings.get("scheme") == "auto":
        raise ValueError("scheme auto cannot be its own candidate")
    name = ", ".join(
        str(value) if key == "scheme" else f"{key} {_shown(value)}"
        for key, value in sorted(settings.items(), key=lambda item: item[0] != "scheme")
    )
    if settings == {"scheme": AS_IS}:
        return Candidate(name, None)
    scheme = settings.get("scheme")
    # Of a few settings it is clear which of the candidates they are for.
    others = {key for key in _FOR_SOME if scheme not in ONLY_FOR[key]}
    read = {key: value for key, value in common.items() if key not in others}
    return Candidate(name, _validated(cls, read | settings, texts))


def _validated(cls: type[Quantize], settings: Settings, texts: Settings) -> Quantize:
    """The stage, with texts to calibrate on if it does not do without."""
    try:
        return cls.model_validate(settings)
    except ValidationError as error:
        try:
            return cls.model_validate(texts | settings)
        except ValidationError:
            problems = explain(error, cls, settings, ())
            told = [": ".join([*map(str, where), message]) for where, message in problems]
            raise ValueError("; ".join(told)) from error


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
