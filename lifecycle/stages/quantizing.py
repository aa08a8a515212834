"""How `quantize` makes what its settings ask for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lifecycle.errors import StageError
from lifecycle.kinds import Arrays, OnnxModel
from lifecycle.pipeline.artifact import Metrics

if TYPE_CHECKING:
    from lifecycle.graph.blockwise import Blockwise
    from lifecycle.graph.cache import QuantizedCache
    from lifecycle.graph.calibration import Calibration
    from lifecycle.graph.int8 import Int8Rowwise
    from lifecycle.graph.quantize import Changes, Quantized, Scheme
    from lifecycle.graph.settled import Constants, Settled
    from lifecycle.pipeline.stage import Context
    from lifecycle.stages.quantize import Quantize

SENSITIVITY = "sensitivity.json"
DISTILLATION = "distillation.json"


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """An empty folder, gone when the block ends; a run that was killed may have left things in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Quantizing:
    """One run of a stage `quantize` over the graph in `source`."""

    def __init__(self, stage: Quantize, ctx: Context, source: Path) -> None:
        self._stage, self._ctx, self._source = stage, ctx, source
        self._texts: list[tuple[int, ...]] | None = None
        self._walk: Calibration | None = None
        """That `method` has taken through the layers."""
        self.metrics: Metrics = {}
        """What else than sizes there is to say of it."""

    def run(self) -> Quantized:
        """Write the graph, its weights and `decoder.json`."""
        from lifecycle.graph.half import Half
        from lifecycle.graph.quantize import quantize_graph

        stage, ctx = self._stage, self._ctx
        self._tell_of_experts()
        told = self._told() if stage.distill else []
        exceptions = self._exceptions()
        with emptied(ctx.scratch / "work") as scratch:
            scheme: Scheme | None = None
            changes, source, measured = self._smoothing(), self._source, None
            match stage.scheme:
                case "int8-rowwise":
                    scheme = self._int8()
                case "int8-static":
                    scheme = self._static()
                case "int4" | "int8" | "mixed":
                    if stage.scheme == "mixed":
                        exceptions |= self._mixed(scratch, exceptions)
                    scheme = self._blockwise()
                    if stage.method == "awq":
                        self._scale_channels(scratch, scheme, exceptions)
                        # Also what the cache is measured on: values are scaled too.
                        source = scratch
                    if stage.distill is not None:
                        scheme, changes = self._distilled(scratch, source, scheme, exceptions, told)
                        if stage.kv_cache is not None:
                            measured = self._as_trained(scratch, source, scheme, changes)
                case "fp16" | "bf16":
                    scheme = Half(stage.scheme)
                case "fp32":
                    pass
            cache = self._cache(measured or source)
            ctx.progress.phase("matrices")
            made = quantize_graph(
                source,
                ctx.out,
                stage.scheme,
                scheme,
                exceptions,
                ctx.progress.update,
                cache=cache,
                changes=changes,
            )
        self._tell_of_visits()
        return made

    def _exceptions(self) -> dict[str, Scheme | None]:
        """Patterns of matrices -> what they are stored as, by the settings."""
        stage = self._stage
        found: dict[str, Scheme | None] = dict.fromkeys(stage.skip)
        is_decoder = isinstance(self._ctx.input(stage.model), OnnxModel)
        if stage.scheme == "int4" and (is_decoder or "int8" in stage.model_fields_set):
            # The default names a part that other graphs do not have.
            found |= dict.fromkeys(stage.int8, self._int8())
        return found

    def _tell_of_experts(self) -> None:
        """Mixtures are most of the weights of their models, and not all that is asked for reaches them."""
        from lifecycle.engines.decoder import GRAPH
        from lifecycle.engines.native.nodes import Graph

        stage = self._stage
        if stage.scheme == "mixed":
            how = "all in 4 bits: only other matrices get more"
        elif stage.scheme in ("int8-rowwise", "int8-static"):
            how = "in 8 bits by blocks of 32, which is what their operator takes"
        else:
            return
        graph = Graph((self._source / GRAPH).read_bytes())
        if any(node.is_a("MoE") for node in graph.nodes):
            self._ctx.progress.log(f"the experts of '{stage.model}' are rounded {how}")

    def _tell_of_visits(self) -> None:
        """A method knows of an expert what the tokens say that visit it."""
        from lifecycle.engines.decoder import DecoderInfo

        if self._walk is None:
            return
        counts = [count for visits in self._walk.visits.values() for count in visits]
        none, width = counts.count(0), DecoderInfo.load(self._source).hidden_size
        few = sum(0 < count < width for count in counts)
        if none or few:
            self._ctx.progress.log(
                f"of {len(counts)} experts {none} are visited by no token of '{self._stage.calibration}' and rounded "
                f"each block by itself, and {few} by fewer than {width} tokens, which say little: give more samples"
            )

    def _int8(self) -> Int8Rowwise:
        from lifecycle.graph.int8 import Int8Rowwise

        return Int8Rowwise(self._stage.bits_here)

    def _cache(self, source: Path) -> QuantizedCache | None:
        from lifecycle.engines.decoder import DecoderInfo
        from lifecycle.graph.cache import calibrate_cache

        stage, progress = self._stage, self._ctx.progress
        if stage.kv_cache is None:
            return None
        calibration = self._calibration(source)
        progress.phase("cache, layers")
        info = DecoderInfo.load(source)
        return calibrate_cache(calibration, info, stage.kv_cache, progress.update)

    def _smoothing(self) -> Changes | None:
        from lifecycle.graph.fold import Smoothing

        if self._stage.smooth is None:
            return None
        return Smoothing(self._calibration(self._source), self._stage.smooth)

    def _blockwise(self) -> Blockwise:
        from lifecycle.graph import hqq
        from lifecycle.graph.blockwise import Blockwise
        from lifecycle.graph.gptq import Gptq
        from lifecycle.graph.rounding import least_squares

        stage = self._stage
        grid = (stage.block_size, 8 if stage.scheme == "int8" else 4, stage.symmetric)
        if stage.method == "gptq":
            self._walk = self._calibration(self._source)
            return Gptq(*grid, calibration=self._walk)
        return Blockwise(*grid, hqq.fit if stage.method == "hqq" else least_squares)

    def _mixed(
        self, scratch: Path, exceptions: dict[str, Scheme | None]
    ) -> dict[str, Scheme | None]:
        """The matrices that stay in 8 bits; writes what was measured."""
        from lifecycle.graph.mixed import measure, save, within_bits, within_kl

        ctx, budget = self._ctx, self._stage.budget
        assert budget is not None
        texts, coarse, fine = self._read_texts(), self._blockwise(), self._int8()
        ctx.progress.phase("sensitivity")
        bits, update = budget.bits_per_weight, ctx.progress.update
        measured = measure(
            self._source, scratch, texts, coarse, fine, exceptions, update, bits=bits
        )
        if bits is not None:
            chosen = within_bits(measured, bits)
        else:
            chosen = within_kl(measured, budget.kl or 0)
        save(measured, chosen, ctx.out / SENSITIVITY)
        return dict.fromkeys((cost.name for cost in chosen), fine)

    def _distilled(
        self,
        scratch: Path,
        source: Path,
        scheme: Blockwise,
        exceptions: dict[str, Scheme | None],
        told: Sequence[Sequence[int]],
    ) -> tuple[Settled, Constants]:
        """The matrices in blocks, and what else was trained; `distillation.json` says what it has gained."""
        from lifecycle.graph.settled import Constants, Settled, round_matrices
        from lifecycle.training.distill import distill

        stage, ctx = self._stage, self._ctx
        settings = stage.distill
        assert settings is not None
        ctx.progress.phase("rounding")
        rounded = round_matrices(source, scratch, scheme, exceptions)
        found = distill(
            source,
            rounded.blocks,
            rounded.rows,
            told,
            settings,
            ctx.scratch,
            ctx.progress,
            device=stage.device,
        )
        report = {"kl_before": found.before, "kl_after": found.after, "steps": settings.steps}
        self.metrics |= {name: report[name] for name in ("kl_before", "kl_after")}
        (ctx.out / DISTILLATION).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        grid = (stage.block_size, scheme.bits, stage.symmetric)
        return Settled(*grid, blocks=found.blocks), Constants(found.floats)

    def _told(self) -> list[tuple[int, ...]]:
        """The texts to train on; whatever can be refused is refused before anything is rounded."""
        from lifecycle.training.runtime import pick_device
        from lifecycle.training.torch_graph import require_trainable

        assert self._stage.distill is not None
        require_trainable(self._source)
        pick_device(self._stage.device)
        texts = self._read(self._stage.distill.samples)
        if len(texts) < 2:
            raise StageError(
                f"distill: '{self._stage.calibration}' has {len(texts)} texts, of which one is held out; give more"
            )
        return texts

    def _as_trained(
        self, scratch: Path, source: Path, settled: Settled, changes: Constants
    ) -> Path:
        """A folder of the float32 graph as it was trained, for what is measured on it."""
        from lifecycle.graph.quantize import quantize_graph
        from lifecycle.graph.settled import Constants

        out = scratch / "trained"
        out.mkdir()
        values = Constants({**settled.blocks, **changes.values})
        quantize_graph(source, out, "fp32", None, changes=values)
        return out

    def _scale_channels(
        self, out: Path, scheme: Blockwise, exceptions: dict[str, Scheme | None]
    ) -> None:
        from lifecycle.graph.awq import scale_channels

        calibration, progress = self._calibration(self._source), self._ctx.progress
        progress.phase("channels")
        scale_channels(self._source, out, calibration, scheme, exceptions, progress.update)
        self._walk = calibration

    def _static(self) -> Scheme:
        from lifecycle.evaluation.inputs import read_inputs
        from lifecycle.graph.activations import histograms
        from lifecycle.graph.static import Int8Static, observed

        stage, ctx, source = self._stage, self._ctx, self._source
        assert stage.calibration is not None
        samples = read_inputs(
            ctx.input(stage.model),
            ctx.input(stage.calibration),
            stage.calibration,
            count=stage.samples,
            length=stage.sample_length,
        )
        ctx.progress.phase("calibration")
        found = histograms(source, observed(source), samples, ctx.progress.update)
        ranges = {name: h.range(stage.calibrate, stage.percentile) for name, h in found.items()}
        return Int8Static(stage.bits_here, ranges)

    def _calibration(self, source: Path) -> Calibration:
        """A walk through the layers of a decoder from the first one on."""
        from lifecycle.graph.calibration import Calibration

        return Calibration(source, self._read_texts(), self._ctx.scratch)

    def _read_texts(self) -> list[tuple[int, ...]]:
        if self._texts is None:
            self._texts = self._read(self._stage.samples)
        return self._texts

    def _read(self, count: int | None) -> list[tuple[int, ...]]:
        from lifecycle.evaluation.inputs import read_texts

        stage = self._stage
        assert stage.calibration is not None
        data = self._ctx.input(stage.calibration)
        if isinstance(data, Arrays):
            raise StageError(
                f"calibration: '{stage.calibration}' is of arrays, but a decoder's layers are "
                "walked with texts"
            )
        length = stage.sample_length
        return read_texts(self._source, data, stage.calibration, count=count, length=length)
