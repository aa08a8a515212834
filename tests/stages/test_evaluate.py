"""The evaluate stage on real models, against the same numbers computed with PyTorch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.ort import OnnxEngine
from lifecycle.errors import DataError, GateError, StageError
from lifecycle.kinds import Conversations, HfModel, OnnxModel, Report
from lifecycle.stages.evaluate import Evaluate
from lifecycle.stages.quantize import Quantize
from tests import tiny
from tests.conftest import RunStage, as_artifact

CHECK = {"model": "model", "data": "chat"}
COMPARE = {**CHECK, "reference": "reference"}
QUANTIZE = {"model": "onnx", "scheme": "int8-rowwise"}


@pytest.fixture
def chat(tmp_path: Path) -> Conversations:
    return tiny.conversations(tmp_path / "chat")


def torch_log_probs(model: HfModel) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Per conversation: log-probabilities at the answer's tokens, and those tokens."""
    network = LlamaForCausalLM.from_pretrained(model.path)
    tokenizer = ChatTokenizer.load(model.path)
    found: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []
    for row in tiny.ROWS:
        ids, flags = tokenizer.encode_supervised(row["messages"])
        at = np.flatnonzero(flags)
        with torch.no_grad(), tiny.one_thread():
            logits = network(torch.tensor([ids])).logits[0].double()
        found.append((logits.log_softmax(-1).numpy()[at - 1], np.array(ids)[at]))
    return found


def torch_perplexity(model: HfModel) -> float:
    pairs = torch_log_probs(model)
    losses = np.concatenate([-rows[np.arange(len(ids)), ids] for rows, ids in pairs])
    return float(np.exp(losses.mean()))


def test_metrics_are_those_of_pytorch(
    run_stage: RunStage,
    chat: Conversations,
    learnt: HfModel,
    learnt_onnx: OnnxModel,
    unlearnt: HfModel,
    unlearnt_onnx: OnnxModel,
) -> None:
    report = run_stage(
        Evaluate(**COMPARE), model=unlearnt_onnx, reference=learnt_onnx, chat=chat
    ).metrics
    ours, theirs = torch_perplexity(unlearnt), torch_perplexity(learnt)
    rows, reference = (
        np.concatenate([rows for rows, _ in torch_log_probs(model)]) for model in (unlearnt, learnt)
    )
    kl = float((np.exp(reference) * (reference - rows)).sum(-1).mean())
    assert report["perplexity"] == pytest.approx(ours, rel=1e-4)
    assert report["perplexity_ratio"] == pytest.approx(ours / theirs, rel=1e-4)
    assert report["kl"] == pytest.approx(kl, rel=1e-3)
    assert report["top1_agreement"] == pytest.approx(
        (rows.argmax(-1) == reference.argmax(-1)).mean()
    )
    assert report["accuracy"] < 1.0
    assert report["accuracy_drop"] == pytest.approx(1.0 - report["accuracy"])


def test_onnx_agrees_with_its_checkpoint(
    run_stage: RunStage, chat: Conversations, learnt: HfModel, learnt_onnx: OnnxModel
) -> None:
    gates = {"logit_max_diff": "<= 1e-4", "top1_agreement": ">= 100 %", "accuracy_drop": "<= 0"}
    report = run_stage(
        Evaluate(**COMPARE, gates=gates), model=learnt_onnx, reference=learnt, chat=chat
    )
    content = Report(report.path, report.manifest).content
    assert content["model"] == {"kind": "onnx-model", "digest": learnt_onnx.digest}
    assert content["reference"]["digest"] == learnt.digest
    assert content["reference"]["metrics"]["accuracy"] == 1.0
    assert content["data"] == {"kind": "conversations", "digest": chat.digest, "split": "test"}
    assert [gate["passed"] for gate in content["gates"]] == [True, True, True]
    assert content["gates"][0] == {
        "metric": "logit_max_diff",
        "bound": "<= 1e-4",
        "measured": content["metrics"]["logit_max_diff"],
        "passed": True,
    }
    assert content["counts"]["questions"] == len(tiny.ROWS)
    assert all(sample["expected"] == sample["got"] for sample in content["samples"])
    assert len(content["samples"]) == 5


def test_accuracy_is_the_share_of_exact_answers(
    run_stage: RunStage, tmp_path: Path, learnt_onnx: OnnxModel
) -> None:
    rows = [
        tiny.conversation("a", " one\n"),
        tiny.conversation("b", "two"),
        tiny.conversation("c", "sixty"),
        tiny.conversation("d", "te"),
    ]
    data = tiny.conversations(tmp_path / "data", rows)
    stage = Evaluate(**CHECK, metrics=["accuracy"])
    report = run_stage(stage, model=learnt_onnx, chat=data)
    assert report.metrics == {"accuracy": 0.5, "questions": 4, "questions_too_long": 0}


def test_two_models_that_answer_are_one_progress(
    run_stage: RunStage, chat: Conversations, learnt_onnx: OnnxModel
) -> None:
    stage = Evaluate(**COMPARE, metrics=["accuracy"])
    report = run_stage(stage, model=learnt_onnx, reference=learnt_onnx, chat=chat)
    done = [update["done"] for update in report.ctx.progress.updates]  # type: ignore[attr-defined]
    assert done == list(range(1, 2 * report.metrics["questions"] + 1))


def test_equal_evaluations_give_equal_bytes(
    run_stage: RunStage, chat: Conversations, learnt_onnx: OnnxModel, unlearnt_onnx: OnnxModel
) -> None:
    inputs = {"model": learnt_onnx, "reference": unlearnt_onnx, "chat": chat}
    one, two = (run_stage(Evaluate(**COMPARE), **inputs) for _ in range(2))
    assert one.digest == two.digest


def test_text_is_scored_whole(run_stage: RunStage, tmp_path: Path, learnt_onnx: OnnxModel) -> None:
    data = tiny.text(tmp_path / "text", ["the red cup " * 20, "six"])
    report = run_stage(Evaluate(**CHECK, max_length=32), model=learnt_onnx, chat=data).metrics
    assert set(report) == {"perplexity", "samples", "samples_too_long", "tokens"}
    assert report["samples"] == 9
    assert report["tokens"] == 240 + 3 - 9


def test_text_asks_no_question(run_stage: RunStage, tmp_path: Path, learnt_onnx: OnnxModel) -> None:
    data = tiny.text(tmp_path / "text", ["six"])
    stage = Evaluate(**CHECK, gates={"accuracy": ">= 0.5"})
    with pytest.raises(StageError, match="'accuracy' needs conversations, but 'chat' is plain"):
        run_stage(stage, model=learnt_onnx, chat=data)


def test_an_empty_split_is_refused(
    run_stage: RunStage, chat: Conversations, learnt_onnx: OnnxModel
) -> None:
    with pytest.raises(DataError, match="'chat' has no train rows"):
        run_stage(Evaluate(**CHECK, split="train"), model=learnt_onnx, chat=chat)


def test_a_failed_gate_stops_with_the_values(
    run_stage: RunStage, chat: Conversations, unlearnt_onnx: OnnxModel
) -> None:
    stage = Evaluate(**CHECK, gates={"accuracy": ">= 99 %", "perplexity": "<= 1e9"})
    with pytest.raises(GateError, match=r"gates failed \(1 of 2\): accuracy is .*, bound >= 99 %"):
        run_stage(stage, model=unlearnt_onnx, chat=chat)


def test_a_model_without_numbers_is_refused(
    run_stage: RunStage, tmp_path: Path, chat: Conversations, learnt: HfModel
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in learnt.path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    model = as_artifact(HfModel, broken)
    with pytest.raises(StageError, match="perplexity of the model is nan"):
        run_stage(Evaluate(**CHECK, metrics=["perplexity"]), model=model, chat=chat)
    gated = Evaluate(**CHECK, metrics=["perplexity"], gates={"perplexity": "<= 9"})
    with pytest.raises(GateError, match="perplexity is nan, bound <= 9"):
        run_stage(gated, model=model, chat=chat)


def test_speed_and_size_are_gates(
    run_stage: RunStage, chat: Conversations, learnt_onnx: OnnxModel
) -> None:
    int8 = run_stage(Quantize.model_validate(QUANTIZE), onnx=learnt_onnx)
    models = {"model": int8, "reference": learnt_onnx}
    sizes = [
        sum((m.path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        for m in models.values()
    ]
    gates = {"size": f"<= {sizes[0] / sizes[1] + 1e-6}", "speed": ">= 1e-9"}
    stage = Evaluate(**COMPARE, gates=gates, batch=2, max_generated=2)
    made = run_stage(stage, **models, chat=chat)
    assert made.metrics["bytes"] == sizes[0]
    assert made.metrics["size"] == pytest.approx(sizes[0] / sizes[1], rel=1e-5)
    assert made.metrics["speed"] > 0 and made.metrics["tokens_per_second"] > 0
    report = Report(made.path, made.manifest).content
    assert [(g["metric"], g["passed"]) for g in report["gates"]] == [
        ("size", True),
        ("speed", True),
    ]
    assert report["reference"]["metrics"]["bytes"] == sizes[1]
    failing = Evaluate(
        **COMPARE, metrics=["speed", "size"], gates={"speed": ">= 1e9", "size": "< 0"}
    )
    with pytest.raises(GateError, match=r"speed is \S+, bound >= 1e9; size is 0\.\d+, bound < 0"):
        run_stage(failing, **models, chat=chat)


def test_what_a_clock_decides_is_measured_only_on_demand(
    run_stage: RunStage, chat: Conversations, learnt_onnx: OnnxModel
) -> None:
    plain = run_stage(Evaluate(**CHECK, max_generated=2), model=learnt_onnx, chat=chat).metrics
    assert not plain.keys() & {"tokens_per_second", "bytes"}
    asked = Evaluate(**CHECK, metrics=["size"])
    assert set(run_stage(asked, model=learnt_onnx, chat=chat).metrics) == {"bytes"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gates": {"speed": ">= 1"}}, "'speed' compares two models: set 'reference'"),
        ({"gates": {"perplexity": 2}}, "'perplexity': 2 does not say.*write '<= 2' or '>= 2'"),
        ({"gates": {"perplexty": "<= 2"}}, "unknown metric 'perplexty'; did you mean 'perplexity'"),
        ({"gates": {"kl": "<= 2"}}, "'kl' compares two models: set 'reference'"),
        ({"gates": {"perplexity": "2"}}, "'perplexity': '2' is no bound"),
        ({"metrics": ["accuracy"], "gates": {"perplexity": "<= 2"}}, "add 'perplexity' to"),
        ({"metrics": ["agreement"]}, "'agreement' compares two models: set 'reference'"),
        ({"metrics": []}, "at least 1 item"),
        ({"max_samples": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_run(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Evaluate.model_validate({**CHECK, **settings})


def test_the_golden_story_is_likely(run_stage: RunStage, tmp_path: Path, data_dir: Path) -> None:
    """Real weights: a story that the model wrote itself is nearly certain to it."""
    source = data_dir / "stories260K"
    model = as_artifact(HfModel, source / "hf")
    story = json.loads((source / "expected_greedy.json").read_text())["doc_greedy"]
    data = tiny.text(tmp_path / "text", [story])
    report = run_stage(Evaluate(**CHECK, max_length=256), model=model, chat=data).metrics
    assert report["perplexity"] < 2


def test_answers_do_not_depend_on_what_else_is_computed(
    run_stage: RunStage, chat: Conversations, learnt_onnx: OnnxModel
) -> None:
    gates = {"batch_invariance": ">= 1", "batch_max_diff": "<= 0"}
    report = run_stage(Evaluate(**CHECK, gates=gates), model=learnt_onnx, chat=chat).metrics
    assert (report["batch_invariance"], report["batch_max_diff"]) == (1.0, 0.0)
    assert report["continuations"] == len(tiny.ROWS)


@pytest.mark.parametrize("scheme", [None, "int8-rowwise"])
def test_logits_do_not_depend_on_how_texts_are_fed(
    run_stage: RunStage, chat: Conversations, learnt_onnx: OnnxModel, scheme: str | None
) -> None:
    model = learnt_onnx
    if scheme is not None:
        model = run_stage(Quantize(model="model", scheme=scheme), model=model)
    gates = {"feeding_max_diff": "<= 1e-5"}
    report = run_stage(Evaluate(**CHECK, gates=gates), model=model, chat=chat).metrics
    assert report["feeding_max_diff"] <= 1e-5
    assert report["feeding_texts"] == 3


@pytest.mark.parametrize("start", [1, 5])
def test_a_model_that_forgets_what_it_was_fed_is_stopped(
    run_stage: RunStage,
    chat: Conversations,
    learnt_onnx: OnnxModel,
    monkeypatch: pytest.MonkeyPatch,
    start: int,
) -> None:
    """Where a text goes on from some token, its cache holds another's."""
    honest = OnnxEngine.forward

    def forward(engine: OnnxEngine, rows: Any) -> Any:
        wrong = [row for row in rows if row.start == start]
        for row in wrong:
            honest(engine, [row._replace(start=0, tokens=[7] * start, num_logits=1)])
        return honest(engine, rows)

    monkeypatch.setattr(OnnxEngine, "forward", forward)
    with pytest.raises(GateError, match="feeding_max_diff"):
        run_stage(
            Evaluate(**CHECK, metrics=["feeding"], gates={"feeding_max_diff": "<= 1e-5"}),
            model=learnt_onnx,
            chat=chat,
        )


def test_a_model_whose_answers_depend_on_it_is_stopped(
    run_stage: RunStage,
    chat: Conversations,
    learnt_onnx: OnnxModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request of a batch begins with another token there."""
    honest = OnnxEngine.generate

    def generate(engine: OnnxEngine, prompts: Any, *rest: Any) -> Any:
        if len(prompts) > 1:
            prompts = [[*prompts[0][:-1], prompts[0][-1] ^ 1], *prompts[1:]]
        return honest(engine, prompts, *rest)

    monkeypatch.setattr(OnnxEngine, "generate", generate)
    gates = {"batch_invariance": ">= 1", "batch_max_diff": "<= 0"}
    with pytest.raises(GateError, match="batch_"):
        run_stage(
            Evaluate(**CHECK, metrics=["invariance"], gates=gates), model=learnt_onnx, chat=chat
        )
