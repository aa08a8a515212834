"""Attention over a cache: what it gives, and that no token's bits depend on what is beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from lifecycle.engines.backend import Row
from lifecycle.engines.layout import pack
from lifecycle.engines.native.swap import swap
from tests.engines.native.conftest import build, run

Floats = NDArray[np.float32]
CAPACITY = 384
STEP = ("qkv", "pad_index", "unpad_index", "key", "value", "last", "counts", "total")


@dataclass(frozen=True)
class Sizes:
    """Of an attention, and what is special about it."""

    heads: int = 4
    kv_heads: int = 2
    depth: int = 32
    rotary: bool = True
    interleaved: bool = False
    window: int = -1
    softcap: float = 0.0
    scale: float | None = None
    bits: int = 32
    """Of a value in the cache: floats, or integers of 8 or 4."""


KINDS = {
    "plain": Sizes(),
    "one head for all": Sizes(heads=6, kv_heads=1, depth=64),
    "a head for each": Sizes(heads=3, kv_heads=3, depth=80),
    "wide": Sizes(heads=2, kv_heads=1, depth=256, scale=0.05),
    "narrow": Sizes(depth=16, rotary=False),
    "odd": Sizes(heads=4, kv_heads=2, depth=8, rotary=False),
    "odd integers": Sizes(heads=4, kv_heads=4, depth=40, rotary=False, window=30, bits=8),
    "interleaved": Sizes(interleaved=True),
    "window": Sizes(window=70),
    "soft cap": Sizes(softcap=5.0),
    "integers": Sizes(heads=9, kv_heads=3, depth=64, bits=8),
    "wide integers": Sizes(heads=2, kv_heads=2, depth=96, window=100, bits=8),
    "4 bits": Sizes(heads=9, kv_heads=3, depth=64, bits=4),
    "odd 4 bits": Sizes(heads=4, kv_heads=4, depth=40, rotary=False, window=30, bits=4),
    "narrow 4 bits": Sizes(heads=6, kv_heads=1, depth=16, bits=4),
    "wide 4 bits": Sizes(heads=2, kv_heads=2, depth=208, bits=4),
    "least 4 bits": Sizes(depth=8, rotary=False, bits=4),
}


class Case:
    """A cache with texts in it, and what is added to them."""

    def __init__(self, sizes: Sizes, rows: int = 4, seed: int = 0) -> None:
        self.sizes, rng = sizes, np.random.default_rng(seed)
        self.last = 2 ** (sizes.bits - 1) - 1
        """The largest integer."""
        shape = (rows, sizes.kv_heads, CAPACITY, sizes.depth)
        self.past = [self._stored(rng.standard_normal(shape)) for _ in range(2)]
        step = {8: 0.01, 4: 0.2}.get(sizes.bits, 1.0)
        scale = rng.uniform(step, 3 * step, (2, 1, sizes.kv_heads, 1, sizes.depth))
        self.scales = scale.astype(np.float32)
        angles = np.outer(np.arange(CAPACITY), 10 ** -np.linspace(0, 3, sizes.depth // 2))
        self.cos, self.sin = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
        width = (sizes.heads + 2 * sizes.kv_heads) * sizes.depth
        self.texts = rng.standard_normal((rows, CAPACITY, width)).astype(np.float32)

    def _stored(self, values: NDArray[np.float64]) -> NDArray[Any]:
        if self.sizes.bits == 32:
            return values.astype(np.float32)
        integers = np.clip(values * self.last * 0.4, -self.last - 1, self.last).astype(np.int8)
        if self.sizes.bits == 8:
            return integers
        first, second = np.moveaxis(integers.reshape(*integers.shape[:-1], -1, 2) + 8, -1, 0)
        return (first | second << 4).astype(np.uint8)

    def _past(self, part: int, row: int) -> NDArray[np.float64]:
        """A row's keys or values, as they are meant."""
        stored = self.past[part][row]
        if self.sizes.bits == 32:
            return stored.astype(np.float64)
        if self.sizes.bits == 4:
            pairs = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8) - 8
            stored = pairs.reshape(*stored.shape[:-1], -1)
        return stored * self.scales[part, 0].astype(np.float64)

    @property
    def model(self) -> bytes:
        """One attention, as graphs of decoders have it."""
        sizes = self.sizes
        names = ["padded", "", "", "key", "value", "last", "total"]
        names += ["cos", "sin"] if sizes.rotary else ["", ""]
        names += ["", "", "", *(["k_scale", "v_scale"] if sizes.bits < 32 else ["", ""])]
        names += ["", "", "counts"]
        attributes: dict[str, Any] = {
            "num_heads": sizes.heads,
            "kv_num_heads": sizes.kv_heads,
            "do_rotary": int(sizes.rotary),
            "rotary_interleaved": int(sizes.interleaved),
            "local_window_size": sizes.window,
            "softcap": sizes.softcap,
        }
        if sizes.scale is not None:
            attributes["scale"] = sizes.scale
        if sizes.bits < 32:
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
            attributes["kv_cache_bit_width"] = sizes.bits
        outputs = ["attended", "new_key", "new_value"]
        nodes = [
            helper.make_node("Gather", ["qkv", "pad_index"], ["padded"]),
            helper.make_node(
                "GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes
            ),
            helper.make_node("GatherND", ["attended", "unpad_index"], ["y"]),
        ]
        whole = self.inputs([(0, 1)] * len(self.texts))
        constants = {
            name: whole.pop(name) for name in ("cos", "sin", "k_scale", "v_scale") if name in whole
        }
        made = {"y": whole["qkv"], "new_key": whole["key"], "new_value": whole["value"]}
        stored = self.past[0].shape[-1]
        return build(nodes, whole, constants, made, {"key": stored, "value": stored})

    def inputs(self, pieces: list[tuple[int, int]]) -> dict[str, NDArray[Any]]:
        """A step that computes tokens `start` to `stop` of each row."""
        rows = [Row(i, start, [0] * (stop - start), 0) for i, (start, stop) in enumerate(pieces)]
        packed = pack([row for row in rows if row.tokens], CAPACITY)
        # Slots behind the last one in use.
        behind = len(pieces) - len(packed["seqlens_k"])
        tokens = [self.texts[i, start:stop] for i, (start, stop) in enumerate(pieces)]
        found: dict[str, NDArray[Any]] = {
            "qkv": np.concatenate(tokens),
            "pad_index": np.pad(packed["pad_index"], ((0, behind), (0, 0))),
            "unpad_index": packed["unpad_index"],
            "key": self.past[0][: len(pieces)].copy(),
            "value": self.past[1][: len(pieces)].copy(),
            "last": np.pad(packed["seqlens_k"], (0, behind)),
            "counts": np.pad(packed["query_seqlens"], (0, behind)),
            "total": np.array([CAPACITY], np.int32),
        }
        if self.sizes.rotary:
            found |= {"cos": self.cos, "sin": self.sin}
        if self.sizes.bits < 32:
            found |= {"k_scale": self.scales[0], "v_scale": self.scales[1]}
        return found

    def run(
        self, kernels: Path | None, pieces: list[tuple[int, int]], threads: int = 2
    ) -> tuple[list[Floats], list[NDArray[Any]]]:
        """What each row's tokens get, and the cache afterwards."""
        model = self.model if kernels is None else swap(self.model)
        given = self.inputs(pieces)
        y, *cache = run(model, kernels, {name: given[name] for name in STEP}, threads)
        ends = np.cumsum([stop - start for start, stop in pieces])
        return np.split(y, ends[:-1]), cache

    def by_hand(self, row: int, start: int, stop: int) -> Floats:
        """The same in float64, one token and head after the other."""
        sizes = self.sizes
        parts = self.texts[row].reshape(CAPACITY, -1, sizes.depth).astype(np.float64)
        keys, values = (self._past(part, row) for part in (0, 1))
        for t in range(start, stop):
            for head in range(sizes.kv_heads):
                new = (
                    self._turned(parts[t, sizes.heads + head], t),
                    parts[t, sizes.heads + sizes.kv_heads + head],
                )
                scales = self.scales[:, 0, head, 0].astype(np.float64)
                for cache, value, scale in zip((keys, values), new, scales, strict=True):
                    if sizes.bits < 32:
                        value = np.clip(np.rint(value / scale), -self.last - 1, self.last) * scale
                    cache[head, t] = value
        found = np.zeros((stop - start, sizes.heads, sizes.depth))
        for t in range(start, stop):
            first = max(0, t + 1 - sizes.window) if sizes.window > 0 else 0
            for head in range(sizes.heads):
                of = head * sizes.kv_heads // sizes.heads
                q = self._turned(parts[t, head], t) * (sizes.scale or sizes.depth**-0.5)
                scores = keys[of, first : t + 1] @ q
                if sizes.softcap:
                    scores = sizes.softcap * np.tanh(scores / sizes.softcap)
                weights = np.exp(scores - scores.max())
                found[t - start, head] = weights @ values[of, first : t + 1] / weights.sum()
        return found.reshape(stop - start, sizes.heads * sizes.depth).astype(np.float32)

    def _turned(self, x: NDArray[np.float64], position: int) -> NDArray[np.float64]:
        if not self.sizes.rotary:
            return x
        cos, sin = self.cos[position], self.sin[position]
        a, b = (x[0::2], x[1::2]) if self.sizes.interleaved else np.split(x, 2)
        turned = a * cos - b * sin, b * cos + a * sin
        return (
            np.stack(turned, axis=-1).ravel() if self.sizes.interleaved else np.concatenate(turned)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_any_number_of_new_tokens(kernels: Path, kind: str) -> None:
    case = Case(KINDS[kind])
    pieces = [(0, 150), (200, 201), (63, 67), (90, 90)]
    found, cache = case.run(kernels, pieces)
    for row, piece in enumerate(pieces):
        expected = case.by_hand(row, *piece)
        np.testing.assert_allclose(
            found[row], expected, atol=2e-5 * max(1, np.abs(expected).max(initial=0))
        )
    _, expected_cache = case.run(None, pieces)
    for new, old in zip(cache, expected_cache, strict=True):
        for row, (_, stop) in enumerate(pieces[:3]):
            np.testing.assert_allclose(new[row, :, :stop], old[row, :, :stop], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_gets_the_same_bits_however_its_text_is_cut(kernels: Path, kind: str) -> None:
    case = Case(KINDS[kind], rows=2)
    (whole, beside), _ = case.run(kernels, [(0, 200), (7, 60)])
    for threads in (1, 2):
        at, parts = 0, []
        for stop in (1, 2, 17, 64, 65, 128, 200):
            (part, _), cache = case.run(kernels, [(at, stop), (0, 0)], threads)
            case.past[0][0], case.past[1][0] = cache[0][0], cache[1][0]
            parts.append(part)
            at = stop
        assert np.array_equal(np.concatenate(parts), whole)
    assert np.isfinite(beside).all()


def test_the_cache_is_written_where_it_is(kernels: Path) -> None:
    import onnxruntime as ort

    case = Case(KINDS["plain"])
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernels))
    session = ort.InferenceSession(swap(case.model), options)
    pieces = [(5, 6)] * 4
    expected, cache = case.run(kernels, pieces)
    given, binding = case.inputs(pieces), ort.IOBinding(session)
    binding.bind_output("y")
    for name in set(STEP) - {"key", "value", "pad_index"}:
        binding.bind_cpu_input(name, given[name])
    for name in ("key", "value"):
        value = ort.OrtValue.ortvalue_from_numpy(given[name])
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"new_{name}", value)
    session.run_with_iobinding(binding)
    assert np.array_equal(given["key"], cache[0]) and np.array_equal(given["value"], cache[1])
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], np.concatenate(expected))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("last", [1, CAPACITY], "does not fit into its cache"),
        ("last", [0, 1], "does not fit into its cache"),
        ("counts", [2, 3], "other tokens than those that are given"),
        ("counts", [2, 1], "other tokens than those that are given"),
        ("unpad_index", [[0, 0], [0, 1], [0, 0], [0, 1]], "does not follow the one before it"),
        ("unpad_index", [[0, 0], [0, 1], [2, 0], [2, 1]], "a row that is not there"),
        ("unpad_index", [[0, 0], [1, 0], [0, 1], [1, 1]], "does not follow the one before it"),
    ],
)
def test_steps_that_make_no_sense_are_refused(
    kernels: Path, name: str, value: list[Any], message: str
) -> None:
    case = Case(KINDS["narrow"], rows=2)
    given = case.inputs([(0, 2), (0, 2)])
    given[name] = np.array(value, given[name].dtype)
    with pytest.raises(Exception, match=message):
        run(swap(case.model), kernels, {name: given[name] for name in STEP})


def test_what_is_no_number_stays_in_its_row(kernels: Path) -> None:
    case = Case(KINDS["plain"])
    expected, _ = case.run(kernels, [(0, 80)] * 4)
    case.texts[1, 40] = np.nan
    found, _ = case.run(kernels, [(0, 80)] * 4)
    assert np.isnan(found[1][40:]).all()
    assert all(np.array_equal(found[row], expected[row]) for row in (0, 2, 3))


def run_shared(
    case: Case, kernels: Path, pieces: list[tuple[int, int]], *, in_place: bool = True
) -> tuple[Floats, NDArray[Any]]:
    """What all tokens get of a cache that has each key with its value behind it, and the cache afterwards."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernels))
    options.log_severity_level = 4
    session = ort.InferenceSession(swap(case.model), options, providers=["CPUExecutionProvider"])
    given = {name: array for name, array in case.inputs(pieces).items() if name in STEP}
    keys, values = given.pop("key"), given.pop("value")
    both = np.concatenate([keys, values], axis=-1)
    binding = ort.IOBinding(session)
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for name, begin in (("key", 0), ("value", keys.shape[-1])):
        place = both.dtype.type, keys.shape, both.ctypes.data + begin * both.itemsize
        binding.bind_input(name, "cpu", 0, *place)
        if in_place:
            binding.bind_output(f"new_{name}", "cpu", 0, *place)
        else:
            binding.bind_output(f"new_{name}")
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy(), both


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_may_share_their_pages(kernels: Path, kind: str) -> None:
    case, pieces = Case(KINDS[kind]), [(0, 150), (200, 201), (63, 67), (90, 90)]
    apart, cache = case.run(kernels, pieces)
    found, both = run_shared(case, kernels, pieces)
    assert np.array_equal(found, np.concatenate(apart))
    assert np.array_equal(both, np.concatenate(cache, axis=-1))


def test_shared_pages_are_written_in_place(kernels: Path) -> None:
    with pytest.raises(Exception, match="have to be written in place"):
        run_shared(Case(KINDS["plain"]), kernels, [(0, 3)] * 4, in_place=False)
