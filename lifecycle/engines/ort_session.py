"""Opens a decoder graph in ONNX Runtime and compares it with what `decoder.json` says."""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort

from lifecycle.engines.adapters import PLACES, TOKENS, AdapterLayout
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.limits import usable_cores
from lifecycle.engines.native.swap import LOGITS, TOPS, attends, swap
from lifecycle.engines.onnx_file import check_external_data
from lifecycle.engines.packed_weights import PROVIDERS, open_packed
from lifecycle.engines.providers import PROVIDER_ENDING, Provider, is_provider, provider_names
from lifecycle.errors import EngineError

STEP_INPUTS = frozenset(
    {
        "input_ids",
        "pad_index",
        "unpad_index",
        "logit_index",
        "seqlens_k",
        "query_seqlens",
        "total_sequence_length",
    }
)
"""The inputs of every decoder graph besides its cache; `position_ids` is there where the
attention does not rotate by itself."""

CACHE_PARTS = ("key", "value")
"""What the cache holds of each layer."""

CACHE_TYPES = {
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),
}
"""`DecoderInfo.kv_dtype` -> the type that holds the cache."""

HOST = "Cpu"
"""What ONNX Runtime calls the memory of the host."""

PAST = "past_key_values."
"""What the names of the inputs that hold keys and values begin with."""

_SPIN_US = "2000"
"""How long a thread without work keeps its core: long enough to be awake when the next step begins,
for waking it takes longer than the engine's own work between two steps. The default is some 35 ms,
in which an engine that has nothing to do starves whatever else runs on the machine."""


_NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Read by GroupQueryAttention as a session is made."""
_ENVIRONMENT = Lock()
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def known_providers(providers: Sequence[Provider]) -> tuple[Provider, ...]:
    """The same by their full names; `cuda`, without the ending that all have, is enough.

    Raises:
        EngineError: this build of ONNX Runtime lacks one, one is named twice, or they have another form.
    """
    if not isinstance(providers, list | tuple) or not all(map(is_provider, providers)):
        raise EngineError(
            f"providers is {providers!r}; it must be a list of names or of pairs of a name and its options, as in "
            "[('cuda', {'device_id': '0'}), 'cpu']"
        )
    available: list[str] = ort.get_available_providers()
    names = {_short(name): name for name in available}
    found = dict[str, Provider]()
    for given, each in zip(provider_names(providers), providers, strict=True):
        name = names.get(_short(given))
        if name is None:
            raise EngineError(
                f"the provider is {given!r}, which this onnxruntime does not have; it has {', '.join(available)}"
            )
        if name in found:
            raise EngineError(f"the provider {given!r} is named twice: leave one out")
        found[name] = name if isinstance(each, str) or not each[1] else (name, each[1])
    return tuple(found.values())


def _short(name: str) -> str:
    return name.lower().removesuffix(PROVIDER_ENDING.lower())


def open_session(
    graph: Path,
    providers: Sequence[Provider],
    threads: int | None = None,
    packed_weights: Path | None = None,
    *,
    whole_scores: bool = False,
    kernels: Path | None = None,
    shared: Sequence[str] = (),
) -> ort.InferenceSession:
    """Load a graph; `threads` None takes one per core that the process may use. `packed_weights` is a
    folder that keeps weights as the kernels of the CPU want them; other providers make no use of it.
    With `whole_scores` attention takes memory for all its scores at once, and less time. `kernels` is a library of
    our operators, which take the place of ONNX Runtime's where they can; `shared` are inputs of a cache that only these
    may read and write.

    Raises:
        EngineError: the file is missing, damaged or takes weights from outside its folder, this
            build of ONNX Runtime lacks one of `providers`, or anyone may write to the folder.
    """
    available: list[str] = ort.get_available_providers()
    if missing := [name for name in provider_names(providers) if name not in available]:
        raise EngineError(
            f"{graph} was made for {missing[0]}, which this onnxruntime does not have; "
            f"it has {', '.join(available)}"
        )
    check_external_data(graph)
    try:
        with _attention(whole_scores):
            if kernels is not None:
                return _open_native(graph, providers, threads, kernels, shared)
            if packed_weights is not None and tuple(providers) == PROVIDERS:
                return open_packed(graph, packed_weights, partial(_options, threads))
            # ONNX Runtime would take the CPU, and say nothing, where a device cannot be opened.
            return ort.InferenceSession(
                graph, _options(threads), providers=list(providers), enable_fallback=0
            )
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"{graph} cannot be opened: {error}") from error


def _open_native(
    graph: Path,
    providers: Sequence[Provider],
    threads: int | None,
    kernels: Path,
    shared: Sequence[str],
) -> ort.InferenceSession:
    """Open a graph with our operators in it. It is given as bytes, so where its weights are has to be said."""
    options = _options(threads)
    options.register_custom_ops_library(str(kernels))
    folder = str(graph.parent.resolve())
    options.add_session_config_entry(_WEIGHTS_FOLDER, folder)
    swapped = swap(graph.read_bytes())
    if shared and not attends(swapped, [(name, present_name(name)) for name in shared]):
        raise EngineError(
            f"{graph} reads its cache by other operators than those that the engine was opened with: open it with kernels: "
            "onnxruntime"
        )
    return ort.InferenceSession(swapped, options, providers=list(providers))


@contextmanager
def _attention(whole_scores: bool) -> Generator[None]:
    """Sessions made in the block compute attention in one way or the other, unless the environment says how."""
    with _ENVIRONMENT:
        if not whole_scores or _NO_FLASH in os.environ:
            yield
            return
        os.environ[_NO_FLASH] = "1"
        try:
            yield
        finally:
            del os.environ[_NO_FLASH]


def _options(threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    # Steps have thousands of different shapes, and a plan of memory would be kept for each.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    # What goes wrong is raised; it need not be printed as well.
    options.log_severity_level = 4
    return options


def check_signature(
    session: ort.InferenceSession,
    info: DecoderInfo,
    graph: Path,
    slots: AdapterLayout | None = None,
    output: tuple[str, int] | None = None,
    *,
    is_native: bool = False,
) -> None:
    """Compare the inputs and outputs of a graph with its description; `slots` are its adapters'. `output` is what it
    gives besides its cache, and how wide that is; by default logits, beside which native kernels tell of the largest.

    Raises:
        EngineError: names the first tensor that is missing, unknown or of another shape.
    """
    if info.kv_dtype not in CACHE_TYPES:
        raise EngineError(
            f"{graph} has a {info.kv_dtype} cache; this engine runs {', '.join(CACHE_TYPES)}"
        )
    cache = cache_names(info)
    cache_type = type_name(CACHE_TYPES[info.kv_dtype])
    inputs = {tensor.name: (tensor.type, *tensor.shape) for tensor in session.get_inputs()}
    outputs = {tensor.name: tensor.shape for tensor in session.get_outputs()}
    if is_native:
        outputs.pop(TOPS, None)
    more = slots.shapes(inputs.keys()) if slots else {}
    of_slots = {TOKENS, PLACES, *more} if slots else set[str]()
    wrong = {*STEP_INPUTS, *cache, *of_slots} ^ (inputs.keys() - {"position_ids"})
    name, width = output or (LOGITS, info.vocab_size)
    wrong |= {name, *map(present_name, cache)} ^ outputs.keys()
    wrong |= {
        name
        for name in inputs.keys() & set(cache)
        if inputs[name][::2] != (cache_type, info.num_kv_heads, info.cache_width)
    }
    wrong |= {n for n in inputs.keys() & more.keys() if inputs[n][2:] != more[n]}
    if outputs.get(name, [width])[-1] != width:
        wrong.add(name)
    if wrong:
        raise EngineError(
            f"{graph} does not match decoder.json: see its tensor '{min(wrong)}'; "
            "export the model again"
        )


def cache_names(info: DecoderInfo) -> list[str]:
    """The inputs that hold keys and values."""
    layers = range(info.num_layers)
    return [f"{PAST}{i}.{part}" for i in layers for part in CACHE_PARTS]


def present_name(past: str) -> str:
    """The output that belongs to an input of the cache."""
    return past.replace(PAST, "present.", 1)


def type_name(dtype: np.dtype[Any]) -> str:
    """What ONNX Runtime calls the type of a tensor."""
    return f"tensor({dtype.name.replace('float32', 'float')})"
