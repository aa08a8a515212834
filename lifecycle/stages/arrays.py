"""The stage `arrays`: samples for any graph, to calibrate it and to compare it."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from lifecycle.errors import DataError
from lifecycle.kinds import Arrays, OnnxGraph
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, SourcePath, Stage


class ArraysStage(Stage):
    """Read samples for a graph, an array for each of its inputs, and hold a part of them out.

    Names, types and shapes are held to the graph's inputs. Nothing is unpickled.
    """

    produces = Arrays
    version: ClassVar[int] = 1

    model: Ref[OnnxGraph]
    """The graph that the samples are for."""
    path: SourcePath
    """An `.npz` file with an array for each input, samples along the first axis; an `.npy` file
    for a graph with one input; a folder of such files, one sample each; or jsonl, a sample a row,
    by the names of the inputs."""
    holdout: float = Field(0.25, ge=0)
    """What becomes the test split: a fraction below 1, or a number of samples."""
    seed: int = 0
    """Another seed holds out other samples."""

    def run(self, ctx: Context) -> Metrics:
        """Write `train.npz` and `test.npz`."""
        import numpy as np

        from lifecycle.data.arrays import Input, Sample, read_samples
        from lifecycle.data.split import held_out_keys
        from lifecycle.graph.inspect import inspect_graph
        from lifecycle.pipeline.files import sha256

        ports = inspect_graph(ctx.input(self.model).path).inputs
        inputs = [Input(port.name, port.dtype, port.shape or ()) for port in ports]
        samples = list(read_samples(self.path, inputs))
        keys = [sha256(b"".join(array.tobytes() for array in s.values())) for s in samples]
        held_out = held_out_keys(keys, self.holdout, self.seed)
        counts = dict[str, int]()
        for split in ("train", "test"):
            chosen: list[Sample] = [
                sample
                for key, sample in zip(keys, samples, strict=True)
                if (key in held_out) == (split == "test")
            ]
            if not chosen and (split == "train" or self.holdout):
                raise DataError(
                    f"{self.path} has {len(samples)} samples, and holdout: {self.holdout:g} leaves "
                    f"none for '{split}': give more, or another holdout"
                )
            arrays: dict[str, Any] = {
                f"{number:06}/{name}": array
                for number, sample in enumerate(chosen)
                for name, array in sample.items()
            }
            np.savez(ctx.out / f"{split}.npz", **arrays)
            counts[split] = len(chosen)
        return counts
