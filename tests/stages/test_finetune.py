from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lifecycle.data.chat import ChatTokenizer
from lifecycle.errors import DataError, InterruptedRun, StageError
from lifecycle.kinds import Conversations, HfModel
from lifecycle.pipeline.artifact import hash_file, hash_tree
from lifecycle.stages.finetune import Finetune
from lifecycle.stages.merge import Merge
from lifecycle.training.model_folder import write_new
from lifecycle.training.models import load_base, load_model, without_renaming_warnings
from tests.conftest import QuietProgress, RunStage, as_artifact
from tests.tiny import ANSWERS, ROWS, conversation, write_tokenizer
from tests.training.conftest import StoppingProgress, tiny_model

RARE = conversation("h", "an answer far longer than any other of them is")


@pytest.fixture
def chats(tmp_path: Path) -> Conversations:
    return conversations(tmp_path / "chats", ROWS * 4, ROWS)


def conversations(
    folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]
) -> Conversations:
    folder.mkdir()
    for name, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return as_artifact(Conversations, folder)  # type: ignore[return-value]


def stage(**settings: Any) -> Finetune:
    values: dict[str, Any] = {
        "model": "base",
        "data": "chats",
        "context_length": 32,
        "batch_size": 2,
        "epochs": 20,
        "learning_rate": 1e-2,
        "threads": 1,
    }
    return Finetune.model_validate(values | settings)


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(3, 20)[None]).logits


def test_lora_learns_and_peft_opens_the_result(
    run_stage: RunStage, learnt: HfModel, tmp_path: Path
) -> None:
    answers = [*ANSWERS.values()]
    others = [conversation(p, a) for p, a in zip(ANSWERS, answers[1:] + answers[:1], strict=True)]
    data = conversations(tmp_path / "data", others * 4, others)
    tuned = run_stage(stage(), base=learnt, chats=data)
    assert isinstance(tuned, HfModel)
    progress: QuietProgress = tuned.ctx.progress  # type: ignore[attr-defined]
    losses = [update["train_loss"] for update in progress.updates if "train_loss" in update]
    assert losses[-1] < 0.5 * losses[0]
    assert tuned.metrics["loss"] < losses[0]
    for file in learnt.files:
        assert hash_file(tuned.path / file.path) == file.sha256
    assert tuned.adapter_path is not None
    with without_renaming_warnings():
        by_peft = PeftModel.from_pretrained(load_base(learnt.path), str(tuned.adapter_path))
    assert torch.equal(logits(by_peft.eval()), logits(load_model(tuned.path)))
    merged = run_stage(Merge.model_validate({"model": "tuned"}), tuned=tuned)
    torch.testing.assert_close(logits(load_model(merged.path)), logits(load_model(tuned.path)))


def test_what_was_trained_on_is_on_record(
    run_stage: RunStage, unlearnt: HfModel, chats: Conversations
) -> None:
    tuned = run_stage(stage(epochs=1), base=unlearnt, chats=chats)
    record = json.loads((tuned.path / "training.json").read_text())
    tokenizer = ChatTokenizer.load(unlearnt.path)
    assert record["chat_template_sha256"] == tokenizer.template_digest
    flags = [sum(tokenizer.encode_supervised(row["messages"])[1]) for row in ROWS]
    assert record["supervised_tokens"] == 4 * sum(flags)
    assert tuned.metrics.items() >= record.items()


def test_the_same_bytes_every_time_also_after_a_stop(
    run_stage: RunStage, unlearnt: HfModel, chats: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = stage(epochs=3, adapter={"use": "lora", "dropout": 0.2})
    undisturbed = run_stage(tuning, base=unlearnt, chats=chats)
    again = run_stage(tuning, base=unlearnt, chats=chats)
    assert hash_tree(again.path) == hash_tree(undisturbed.path)

    ctx = again.ctx  # type: ignore[attr-defined]
    stopped = replace(ctx, out=ctx.out.parent / "other", progress=StoppingProgress(5))
    for leftover in ctx.scratch.iterdir():
        leftover.unlink()
    stopped.out.mkdir()
    with pytest.raises(InterruptedRun):
        tuning.run(stopped)
    assert not any(stopped.out.iterdir())
    resumed = replace(stopped, progress=QuietProgress())
    tuning.run(resumed)
    assert any("resumed at step" in line for line in resumed.progress.lines)
    assert hash_tree(resumed.out) == hash_tree(undisturbed.path)


def test_without_an_adapter_all_weights_are_trained(
    run_stage: RunStage, unlearnt: HfModel, chats: Conversations
) -> None:
    tuned = run_stage(stage(adapter=None), base=unlearnt, chats=chats)
    assert isinstance(tuned, HfModel)
    assert tuned.adapter_path is None
    before, after = load_base(unlearnt.path), load_model(tuned.path)
    for name, weight in before.named_parameters():
        assert not torch.equal(weight, after.get_parameter(name)), name


@pytest.mark.parametrize(("on_long", "truncated", "too_long"), [("truncate", 1, 0), ("drop", 0, 1)])
def test_long_conversations_are_counted_and_said(
    run_stage: RunStage,
    unlearnt: HfModel,
    tmp_path: Path,
    on_long: str,
    truncated: int,
    too_long: int,
) -> None:
    silent = conversation("a", "x")
    silent["messages"][1]["train"] = False
    data = conversations(tmp_path / "data", [*ROWS, RARE, silent], [])
    tuned = run_stage(stage(epochs=1, on_long=on_long), base=unlearnt, chats=data)
    counts = {key: tuned.metrics[key] for key in ("truncated", "too_long", "unsupervised")}
    assert counts == {"truncated": truncated, "too_long": too_long, "unsupervised": 1}
    progress: QuietProgress = tuned.ctx.progress  # type: ignore[attr-defined]
    assert len(progress.lines) == 3
    assert "no loss on the test split" in progress.lines[-1]
    assert "loss" not in tuned.metrics


def test_nothing_to_train_on_is_refused(
    run_stage: RunStage, unlearnt: HfModel, tmp_path: Path
) -> None:
    silent = conversation("a", "x")
    silent["messages"][1]["train"] = False
    data = conversations(tmp_path / "data", [silent], [])
    with pytest.raises(DataError, match="no sample has a token to train on"):
        run_stage(stage(), base=unlearnt, chats=data)


def test_a_context_that_the_model_does_not_have_is_refused(
    run_stage: RunStage, unlearnt: HfModel, chats: Conversations
) -> None:
    with pytest.raises(StageError, match="max_position_embeddings is 64"):
        run_stage(stage(context_length=65), base=unlearnt, chats=chats)


def test_a_tokeniser_of_another_model_is_refused(run_stage: RunStage, tmp_path: Path) -> None:
    write_new(tiny_model(), tmp_path / "small")
    write_tokenizer(tmp_path / "small")
    small = as_artifact(HfModel, tmp_path / "small")
    data = conversations(tmp_path / "data", [conversation("0", "9")], [])
    with pytest.raises(StageError, match="'base' has 50 tokens"):
        run_stage(stage(), base=small, chats=data)


def test_tuning_a_merged_model_leaves_its_own_record_alone(
    run_stage: RunStage, unlearnt: HfModel, chats: Conversations, tmp_path: Path
) -> None:
    first = run_stage(stage(epochs=1), base=unlearnt, chats=chats)
    merged = run_stage(Merge.model_validate({"model": "tuned"}), tuned=first)
    record = merged.path / "training.json"
    record.chmod(0o444)
    before = hash_file(record)
    fewer = conversations(tmp_path / "fewer", ROWS, ROWS)
    second = run_stage(stage(epochs=1), base=merged, chats=fewer)
    assert hash_file(record) == before
    assert json.loads((second.path / "training.json").read_text()) != json.loads(record.read_text())


def test_adapters_are_not_stacked(
    run_stage: RunStage, unlearnt: HfModel, chats: Conversations
) -> None:
    tuned = run_stage(stage(epochs=1), base=unlearnt, chats=chats)
    with pytest.raises(StageError, match="already has an adapter; put a merge"):
        run_stage(stage(), base=tuned, chats=chats)


def test_lora_on_real_weights(
    run_stage: RunStage, data_dir: Path, tmp_path: Path, chats: Conversations
) -> None:
    base = tmp_path / "stories"
    base.mkdir()
    for file in (data_dir / "stories260K" / "hf").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    model = as_artifact(HfModel, base)
    tuned = run_stage(stage(epochs=4, context_length=64), base=model, chats=chats)
    progress: QuietProgress = tuned.ctx.progress  # type: ignore[attr-defined]
    losses = [update["train_loss"] for update in progress.updates if "train_loss" in update]
    assert losses[-1] < losses[0]
    merged = run_stage(Merge.model_validate({"model": "tuned"}), tuned=tuned)
    assert merged.metrics["max_logit_diff"] < 1e-3
