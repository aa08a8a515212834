"""Ways to quantise a decoder that `quality` measures, by group and name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.graph import hqq, mixed
from lifecycle.graph.activations import decoder_samples, histograms
from lifecycle.graph.awq import scale_channels
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import KvType, calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.fold import Smoothing
from lifecycle.graph.gptq import Gptq
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Quantized, Scheme, quantize_graph
from lifecycle.graph.rounding import least_squares
from lifecycle.graph.settled import Constants, Settled, round_matrices
from lifecycle.graph.static import Int8Static, observed
from lifecycle.stages.quantize import Distill
from lifecycle.training.distill import distill

FINE = Int8Rowwise(8)
HEAD: Mapping[str, Scheme | None] = {"lm_head": FINE}

Way = Callable[[Path, Path], Quantized]
"""A scratch folder, the folder of the new graph -> what it came to."""
Method = Literal["rtn", "awq", "gptq", "hqq"]


class Said:
    """Progress as lines on standard error."""

    stopping = False

    def update(self, done: float, total: float | None = None, **metrics: float) -> None:
        """One of a hundred is said."""
        if total and done % max(1, total // 100) == 0:
            self.log(f"{done:g} of {total:g}: {metrics}")

    def phase(self, name: str) -> None:
        """Nothing is drawn."""

    def log(self, message: str) -> None:
        """One line."""
        print(message, file=sys.stderr)


@dataclass(frozen=True)
class Ways:
    """Of the float32 graph in `source`, calibrated on `texts`, token ids."""

    source: Path
    texts: list[list[int]]
    told: list[list[int]] = field(default_factory=list[list[int]])
    """What is trained on where a way has `/distilled` behind its name."""
    distill: Distill = field(default_factory=lambda: Distill.model_validate({}))

    def all(self, sizes: tuple[int, ...], budgets: tuple[float, ...]) -> Iterator[tuple[str, Way]]:
        """Every way to quantise, by group and name: `int4/64/gptq`."""
        yield from self._int8()
        for size in sizes:
            yield f"int8/{size}/rtn", self._blocks(size, "rtn", bits=8)
            for symmetric in (True, False):
                methods: tuple[Method, ...] = ("rtn", "awq", "gptq")
                for method in methods if symmetric else (*methods, "hqq"):
                    name = f"int4/{size}/{method}" + ("" if symmetric else "/zeros")
                    yield name, self._blocks(size, method, symmetric)
        for size in (size for size in sizes if size < 128):
            for symmetric in (True, False):
                kind = "" if symmetric else "/zeros"
                for method in ("rtn", "gptq"):
                    for bits in (
                        bits for bits in budgets if bits > 4 + 10 / size + (not symmetric) / 4
                    ):
                        name = f"mixed/{bits:g}/{size}/{method}{kind}"
                        yield name, self._mixed(bits, size, method, symmetric)
                        if method == "gptq" and self.told:
                            yield f"{name}/distilled", self._distilled(bits, size, symmetric)

    def _int8(self) -> Iterator[tuple[str, Way]]:
        for bits in (7, 8):
            yield f"int8-rowwise/{bits}", self._write(Int8Rowwise(bits))
        yield "int8-rowwise/8/smooth", self._smooth(0.5)
        for bits in (7, 8):
            yield f"int8-static/{bits}/minmax", self._static(bits, "minmax")
            yield f"int8-static/{bits}/percentile", self._static(bits, "percentile")
        yield "kv_cache/int8", self._cache("int8")
        yield "kv_cache/int4", self._cache("int4")

    def scheme(
        self, size: int, method: Method, symmetric: bool = True, bits: Literal[4, 8] = 4
    ) -> Blockwise:
        """Blocks, with a walk through the layers that nothing else has begun."""
        if method == "gptq":
            return Gptq(size, bits, symmetric, calibration=self._calibration())
        return Blockwise(size, bits, symmetric, hqq.fit if method == "hqq" else least_squares)

    def _calibration(self) -> Calibration:
        return Calibration(self.source, self.texts)

    def _write(self, scheme: Scheme) -> Way:
        return lambda _, out: quantize_graph(self.source, out, "measured", scheme)

    def _smooth(self, strength: float) -> Way:
        def way(_: Path, out: Path) -> Quantized:
            smoothing = Smoothing(self._calibration(), strength)
            return quantize_graph(self.source, out, "measured", FINE, changes=smoothing)

        return way

    def _static(self, bits: int, kind: Literal["minmax", "percentile"]) -> Way:
        def way(_: Path, out: Path) -> Quantized:
            samples = list(decoder_samples(self.texts))
            found = histograms(self.source, observed(self.source), samples, lambda *_: None)
            ranges = {name: each.range(kind, 99.99) for name, each in found.items()}
            return quantize_graph(self.source, out, "measured", Int8Static(bits, ranges))

        return way

    def _cache(self, kv_dtype: KvType) -> Way:
        def way(_: Path, out: Path) -> Quantized:
            info = DecoderInfo.load(self.source)
            cache = calibrate_cache(self._calibration(), info, kv_dtype, lambda *_: None)
            return quantize_graph(self.source, out, "measured", None, cache=cache)

        return way

    def _blocks(
        self, size: int, method: Method, symmetric: bool = True, bits: Literal[4, 8] = 4
    ) -> Way:
        def way(scratch: Path, out: Path) -> Quantized:
            scheme, source = self.scheme(size, method, symmetric, bits), self.source
            if method == "awq":
                scale_channels(source, scratch, self._calibration(), scheme, HEAD)
                source = scratch
            exceptions = HEAD if bits == 4 else {}
            return quantize_graph(source, out, "measured", scheme, exceptions)

        return way

    def _mixed(self, bits: float, size: int, method: Method, symmetric: bool) -> Way:
        def way(scratch: Path, out: Path) -> Quantized:
            fine = self._within(bits, scratch, self.scheme(size, method, symmetric))
            coarse = self.scheme(size, method, symmetric)
            return quantize_graph(self.source, out, "measured", coarse, fine)

        return way

    def _distilled(self, bits: float, size: int, symmetric: bool) -> Way:
        def way(scratch: Path, out: Path) -> Quantized:
            fine = self._within(bits, scratch, self.scheme(size, "gptq", symmetric))
            rounded = round_matrices(
                self.source, scratch, self.scheme(size, "gptq", symmetric), fine
            )
            blocks, rows = rounded.blocks, rounded.rows
            found = distill(self.source, blocks, rows, self.told, self.distill, scratch, Said())
            scheme = Settled(size, 4, symmetric, blocks=found.blocks)
            changes = Constants(found.floats)
            return quantize_graph(self.source, out, "measured", scheme, fine, changes=changes)

        return way

    def _within(self, bits: float, scratch: Path, coarse: Blockwise) -> dict[str, Scheme | None]:
        """The matrices that a budget leaves in 8 bits."""
        measured = mixed.measure(self.source, scratch, self.texts, coarse, FINE, {})
        return {cost.name: FINE for cost in mixed.within_bits(measured, bits)}
