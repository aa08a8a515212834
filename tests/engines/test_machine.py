"""The machine of `tests.engines.machine` over real models, with what PyTorch answers as the measure.

Two engines round differently, so a token may only be asked for where it is ahead of the next one by much more
than that: for each model `ample` is at least three times the largest difference of their logits, and prompts
are such that each token of each answer is ahead by so much.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines import (
    batched,
    prefix_cache,
    pytorch_adapters,
    scheduler,
    speculation,
)
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchBackend, TorchEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.training.models import load_model
from tests.engines.machine import (
    ADAPTER_SLOTS,
    CHUNKS,
    CONTEXT,
    LONGEST,
    NUM_PROMPTS,
    Answer,
    EngineMachine,
    Paced,
    PacedEngine,
    PacedTorchEngine,
    Subject,
)
from tests.reduced import OVERRIDES
from tests.test_quickstart import lifecycle
from tests.tiny import one_thread

ALONE = EngineOptions(1, CONTEXT)


def answer(engine: BatchedEngine, prompt: Sequence[int], adapter: str | None) -> Answer:
    """What a request gets that is there alone."""
    params = SamplingParams(LONGEST, logprobs=0, ignore_eos=True)
    engine.submit(Request("alone", prompt, params, adapter))
    found: Answer = []
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            assert event.token_id is not None and event.logprob is not None
            found.append((event.token_id, event.logprob))
    return found


def told(
    reference: TorchEngine, prompt: Sequence[int], adapter: str | None
) -> tuple[tuple[int, ...], NDArray[np.float32], float]:
    """PyTorch's answer, the logits of the text with it [len(prompt) + LONGEST - 1, vocabulary], and how far ahead of
    the next one that token of the answer is which is least ahead."""
    params = SamplingParams(LONGEST, ignore_eos=True)
    (wanted,) = reference.generate([prompt], params, adapter=adapter)
    logits = reference.logits([*prompt, *wanted.token_ids[:-1]], adapter)
    first, second = np.sort(logits[len(prompt) - 1 :])[:, [-1, -2]].T
    return wanted.token_ids, logits, float((first - second).min())


def is_ample(
    reference: TorchEngine,
    engine: OnnxEngine,
    prompt: Sequence[int],
    ample: float,
    adapter: str | None = None,
) -> bool:
    """Whether each token of PyTorch's answer is far ahead of the next one; it is that of the other engine
    then."""
    wanted, logits, lead = told(reference, prompt, adapter)
    text = [*prompt, *wanted[:-1]]
    assert np.abs(engine.logits(text, adapter) - logits).max() < ample / 3
    if lead < ample:
        return False
    assert tuple(token for token, _ in answer(engine, prompt, adapter)) == wanted
    return True


def make_subject(
    kind: type[PacedEngine | PacedTorchEngine],
    folder: Path,
    prompts: Sequence[list[int]],
    adapters: Sequence[Path] = (),
    *,
    tolerance: float,
) -> Subject:
    assert len(prompts) == NUM_PROMPTS
    answers: dict[tuple[int, int, int | None], Answer] = {}
    for chunk in CHUNKS:
        engine = kind.open(folder, EngineOptions(1, CONTEXT, 1, chunk))
        for number in (None, *range(len(adapters))):
            if number is not None:
                engine.load_adapter("a", adapters[number], replace=True)
            for n, prompt in enumerate(prompts):
                name = "a" if number is not None else None
                found = answers[n, chunk, number] = answer(engine, prompt, name)
                first = answers[n, CHUNKS[0], number]
                assert [token for token, _ in found] == [token for token, _ in first]
    per_token = engine.stats.cache_capacity_bytes // CONTEXT
    return Subject(kind, folder, prompts, adapters, answers, per_token, tolerance)


def shared_prompts(stem: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Texts that begin as `stem`, of 40 tokens that the model itself has told: for less than a chunk, for
    chunks, and for a little more. The last two repeat it, so that guesses come true."""
    rng = np.random.default_rng(seed)
    mixed = [
        [*stem[:n], *rng.integers(3, vocab_size, more).tolist()]
        for n, more in ((5, 9), (16, 1), (32, 3), (33, 5), (40, 2))
    ]
    return [*mixed, stem[:32], [*stem[:16] * 2, *stem[:6]], [*stem[:12] * 3, *stem[:3]]]


def run(subject: Subject, examples: int) -> None:
    """Let the machine do what Hypothesis thinks of."""
    run_state_machine_as_test(
        lambda: EngineMachine(subject),
        settings=settings(max_examples=examples, stateful_step_count=40, deadline=None),
    )


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's time is that of `Paced`, also where it decides how much is copied or guessed."""
    time = SimpleNamespace(perf_counter=lambda: Paced.now, monotonic=lambda: Paced.now)
    for module in (batched, prefix_cache, scheduler, speculation):
        monkeypatch.setattr(module, "time", time)
    # Small enough for copies of these prompts to take several.
    monkeypatch.setattr(scheduler, "_PART", 1 << 13)


def make_stories(base: Path, story: list[int], root: Path) -> dict[str, Subject]:
    """stories260K with as many adapters as slots, for each engine."""
    graph = root / "onnx"
    graph.mkdir()
    export_decoder(base, graph, Cpu(), slots=(ADAPTER_SLOTS, 8))
    layout = AdapterLayout.load(graph)
    assert layout is not None
    engine, reference = OnnxEngine.open(graph, ALONE), TorchEngine.open(base, ALONE)
    adapters = [root / str(n) for n in range(ADAPTER_SLOTS)]
    for n, folder in enumerate(adapters):
        write_random_adapter(folder, layout, seed=n)
        for each in (engine, reference):
            each.load_adapter(str(n), folder)
    # Of the first seeds the one whose answers have no close choices.
    prompts, ample = shared_prompts(story[1:41], reference.vocab_size, seed=12), 0.008
    for name in (None, *engine.adapters):
        assert all(is_ample(reference, engine, prompt, ample, name) for prompt in prompts)
    forms = {"onnxruntime": (PacedEngine, graph), "pytorch": (PacedTorchEngine, base)}
    return {
        name: make_subject(*form, prompts, adapters, tolerance=1e-4) for name, form in forms.items()
    }


@pytest.fixture(scope="module")
def both(
    data_dir: Path, story: list[int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("machine")
    with one_thread():
        return make_stories(data_dir / "stories260K" / "hf", story, root)


@pytest.fixture(params=["onnxruntime", "pytorch"])
def with_adapters(
    request: pytest.FixtureRequest, both: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Subject]:
    monkeypatch.setattr(pytorch_adapters, "SLOTS", ADAPTER_SLOTS)
    with one_thread():
        yield both[request.param]


def test_a_model_with_adapters(with_adapters: Subject) -> None:
    run(with_adapters, examples=25)


def test_all_of_it_can_happen(with_adapters: Subject) -> None:
    """By one course of which everything is known."""
    machine = EngineMachine(with_adapters)
    machine.open(2, 16, 1000, contexts=1, max_stall=1.2, draft_tokens=4, loaded=2)
    engine = machine.engine
    machine.submit(7, copies=2, priority=2)
    machine.step(12)
    machine.submit(4, place=1, priority=1)
    machine.submit(3, place=2)
    machine.step(4)
    assert engine.num_waiting == 2 and engine.stats.preemptions == 2
    machine.unload(1)
    machine.load("a", 2, replace=True)
    # The requests of both have their slots still.
    machine.load("c", 0)
    assert engine.adapters == ("a",)
    machine.step(60)
    assert not machine.left and engine.stats.accepted_tokens > 0
    machine.load("b", 1)
    machine.load("c", 0)
    machine.submit(2, place=1)
    machine.load("d", 1, evict=True)
    assert engine.adapters == ("a", "c", "d")
    machine.load("c", 1, replace=True)
    machine.submit(5, place=2, stop_at=3)
    machine.cancel(1)
    machine.step(60)
    # Another adapter in the same slot, and the same prompt.
    for number in (0, 1):
        machine.load("a", number, replace=True)
        machine.submit(3, place=1)
        machine.step(30)
    machine.submit(3, place=1)
    machine.step(30)
    assert engine.stats.prefix_hit_tokens > 0
    machine.teardown()


@torch.no_grad()
def round_to_int8(model: PreTrainedModel, levels: int) -> None:
    """Let a model compute as the scheme int8-rowwise means it: every row of weights and of activations
    in integers, by its own maximum."""
    done: list[torch.Tensor] = []
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        if not any(module.weight is tensor for tensor in done):
            done.append(module.weight)
            step = module.weight.abs().amax(1, keepdim=True) / levels
            module.weight.copy_((module.weight / step).round() * step)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(_round_activations)


def _round_activations(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    largest = inputs[0].abs().amax(-1, keepdim=True)
    return (inputs[0] / largest * 127).round() / 127 * largest


def candidates(reference: TorchEngine, tokenizer: ChatTokenizer, rows: Path) -> Iterator[list[int]]:
    """Short questions, alone and as the second ones of conversations; then what the model tells."""
    asked: list[Any] = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    asked.sort(key=lambda messages: len(messages[0]["content"]))
    for messages in asked[2:14]:
        for before in ([], asked[0], asked[1]):
            yield tokenizer.encode_chat([*before, *messages[:-1]])
    for first in asked[:4]:
        question = tokenizer.encode_chat(first[:-1])
        (told,) = reference.generate([question], SamplingParams(40, ignore_eos=True))
        yield from shared_prompts(list(told.token_ids), reference.vocab_size, len(question))


def suits(
    reference: TorchEngine,
    prompt: Sequence[int],
    ample: float,
    adapter: str,
    others: Sequence[str | None],
) -> bool:
    """Whether an adapter leaves no close choice, and so much of a difference to a prompt that an engine within a third
    of `ample` of PyTorch cannot have taken one of `others` for it."""
    if told(reference, prompt, adapter)[2] < ample:
        return False
    logits = reference.logits(prompt, adapter)
    apart = (np.abs(logits - reference.logits(prompt, other)).max() for other in others)
    return min(apart) > 2 * ample / 3


def suited(
    reference: TorchEngine,
    prompts: list[list[int]],
    layout: AdapterLayout,
    ample: float,
    root: Path,
) -> tuple[list[list[int]], list[Path]]:
    """The first random adapters for which there are prompts that suit all of them, and those prompts."""
    found: list[Path] = []
    for seed in range(100):
        folder = root / str(seed)
        write_random_adapter(folder, layout, seed)
        reference.load_adapter(folder.name, folder)
        others = (None, *(each.name for each in found))
        left = [p for p in prompts if suits(reference, p, ample, folder.name, others)]
        if len(left) < NUM_PROMPTS:
            reference.unload_adapter(folder.name)
            continue
        prompts, found = left, [*found, folder]
        if len(found) == ADAPTER_SLOTS:
            return prompts[:NUM_PROMPTS], found
    raise AssertionError("no random adapters suit the model")


def make_quickstart(stages: dict[str, Any], root: Path) -> Subject:
    """The bundle of a run of the quickstart, with as many adapters as slots."""
    bundle, merged, task = (Path(stages[name]["path"]) for name in ("bundle", "merged", "task"))
    engine, model = OnnxEngine.open(bundle, ALONE), load_model(merged)
    round_to_int8(model, levels=63)
    reference = TorchEngine(
        TorchBackend(model),
        options=ALONE,
        vocab_size=engine.vocab_size,
        max_model_len=CONTEXT,
        eos_token_ids=frozenset(),
    )
    layout = AdapterLayout.load(bundle)
    assert layout is not None
    found = candidates(reference, ChatTokenizer.load(bundle), task / "test.jsonl")
    # An activation that is rounded to the next integer moves a logit by up to 0.33.
    ample = 1.0
    short = (prompt for prompt in found if len(prompt) <= CONTEXT - LONGEST)
    far = [prompt for prompt in short if is_ample(reference, engine, prompt, ample)]
    prompts, adapters = suited(reference, far, layout, ample, root)
    for folder in adapters:
        engine.load_adapter(folder.name, folder)
        assert all(is_ample(reference, engine, prompt, ample, folder.name) for prompt in prompts)
    # Our kernels promise the same bits however a text is cut.
    tolerance = 0.0 if engine.kernels == "native" else ample
    return make_subject(PacedEngine, bundle, prompts, adapters, tolerance=tolerance)


@pytest.mark.slow
def test_the_quickstarts_bundle(quickstart_store: Path, tmp_path: Path) -> None:
    """The bundle in int8, exported with slots, under the kernels that this machine takes.

    A request among others gets what the same engine gives it alone, to the bit; with ONNX Runtime's kernels not where
    tokens are guessed or texts computed anew, where the tokens are the same still. Alone it gets PyTorch's tokens, and
    logits within a third of the lead that each of them has at least. PyTorch rounds weights and activations as the
    scheme does, but computes adapters in float32, of activations that are rounded. Our kernels round an adapter's
    weights to 8 bits as well, and ONNX Runtime's multiply it with activations that are not rounded; both are small
    beside that third, and an adapter that is left out or taken for another is not. The model has learnt little: its
    tokens are often the same with each adapter, so that among others log-probabilities tell them apart.
    """
    slots = f"onnx.adapters={{slots: {ADAPTER_SLOTS}, rank: 4}}"
    code, result, err = lifecycle(quickstart_store, "run", "quickstart", *OVERRIDES, slots)
    assert code == 0, err
    with one_thread():
        subject = make_quickstart(result["stages"], tmp_path)
    run(subject, examples=25)
