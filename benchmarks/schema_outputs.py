"""Outputs drawn through a grammar without a model, and what JSON Schema says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Context, Decimal, InvalidOperation, localcontext
from functools import partial
from typing import Any

import numpy as np
import regex
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lifecycle.engines.requests import Constraint
from lifecycle.errors import RequestError

_PATIENCE, _HASTE = 8, 40
"""Chosen tokens after which ends are preferred, and further ones after which they always are."""
_MOST = 400
"""Tokens of an output."""
_WHITE = r"\t-\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_ECMASCRIPT = {
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\W": "[^0-9A-Za-z_]",
    r"\s": f"[{_WHITE}]",
    r"\S": f"[^{_WHITE}]",
    "$": r"\Z",
    ".": r"[^\n\r\u2028\u2029]",
}
"""What has another meaning in Python."""


class Drawer:
    """Draws outputs for one tokeniser as the engine does: masks, and tokens that are forced."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        """`end` is the token that ends an output."""
        self._end = end
        self._closing: NDArray[np.bool_] = np.zeros(vocab_size, np.bool_)
        for token in range(tokenizer.get_vocab_size()):
            text = tokenizer.decode([token], skip_special_tokens=False)
            self._closing[token] = bool(text) and not text.strip('"]}')
        self._closing[end] = True

    def draw(
        self, constraint: Constraint, rng: np.random.Generator, begin: Sequence[int] = ()
    ) -> list[int] | None:
        """The tokens of an output, its end left out; None if it has none soon.

        Args:
            begin: tokens that it begins with, as far as they are allowed.
        """
        tokens = list[int]()
        chosen = 0
        while not constraint.is_complete and len(tokens) < _MOST:
            mask, at = constraint.mask(), len(tokens)
            if at < len(begin) and tokens == [*begin[:at]] and mask[begin[at]]:
                token = begin[at]
            else:
                token, chosen = self._choose(mask, rng, chosen), chosen + 1
            constraint.accept(token)
            if token == self._end:
                return tokens
            tokens.append(token)
            for forced in constraint.forced():
                if not constraint.mask()[forced]:
                    raise AssertionError(f"token {forced} is forced and not allowed")
                constraint.accept(forced)
                tokens.append(forced)
        return tokens if constraint.is_complete else None

    def _choose(self, mask: NDArray[np.bool_], rng: np.random.Generator, chosen: int) -> int:
        if rng.random() * _HASTE < chosen - _PATIENCE and (mask & self._closing).any():
            mask = mask & self._closing
        if not mask.any():
            raise RequestError("no token is allowed")
        return int(rng.choice(np.flatnonzero(mask)))


def why_invalid(text: str, schema: object) -> str | None:
    """What is wrong with an output, None if nothing is. Numbers are compared exactly."""
    try:
        value = json.loads(text, parse_float=_number)
    except ValueError as error:
        return f"no JSON: {error}"
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = _Validator(exact, format_checker=_formats())
    with localcontext(Context(prec=4 * _MOST)):
        error = next(validator.iter_errors(value), None)
    return None if error is None else error.message


def _formats() -> FormatChecker:
    """Those of jsonschema, as far as what they need is installed; and the leap seconds of UTC, which it lacks."""
    found = FormatChecker(())
    found.checkers = dict(Draft202012Validator.FORMAT_CHECKER.checkers)
    for name in {"time", "date-time"} & found.checkers.keys():
        check, raises = found.checkers[name]
        found.checkers[name] = (partial(_without_leap, check), raises)
    return found


def _without_leap(check: Callable[[object], bool], text: object) -> bool:
    if isinstance(text, str):
        text = re.sub(r"23:59:60(?=(\.\d+)?([Zz]|[+-]00:00)$)", "23:59:59", text)
    return check(text)


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        # An exponent of more digits than there may be: infinity, or nothing.
        return Decimal(float(text))


def _matches(pattern: str, text: str) -> bool:
    """By ECMAScript, for which jsonschema takes Python's expressions."""
    translated = re.sub(r"\\.|[$.]", lambda found: _ECMASCRIPT.get(found[0], found[0]), pattern)
    return regex.search(translated, text, regex.VERSION1) is not None


def _pattern(
    validator: Validator, pattern: str, instance: object, schema: object
) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], instance: Any, schema: object
) -> Iterator[ValidationError]:
    for name, value in instance.items() if isinstance(instance, dict) else ():
        for pattern, inner in patterns.items():
            if _matches(pattern, name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional_properties(
    validator: Any, inner: Any, instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    for name, value in instance.items() if isinstance(instance, dict) else ():
        is_matched = any(_matches(pattern, name) for pattern in schema.get("patternProperties", ()))
        if name not in schema.get("properties", ()) and not is_matched:
            yield from validator.descend(value, inner, path=name)


_Validator: Any = extend(
    Draft202012Validator,
    {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    },
)
