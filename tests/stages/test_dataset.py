from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lifecycle.errors import DataError
from lifecycle.stages.dataset import Dataset
from tests.conftest import RunStage


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exchange(question: str, answer: str = "a") -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def questions(artifact: Any, split: str) -> list[str]:
    return [row["messages"][0]["content"] for row in artifact.rows(split)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "x.jsonl", [exchange(str(i // 2), str(i)) for i in range(400)])


def test_holds_out_whole_questions(path: Path, run_stage: RunStage) -> None:
    made = run_stage(Dataset(path=path, holdout=0.2))
    train, test = questions(made, "train"), questions(made, "test")
    assert len(train) + len(test) == 400 and not set(train) & set(test)
    assert 50 < len(test) < 110
    assert made.metrics == {"train": len(train), "test": len(test), "read": 400, "dropped": {}}
    report = json.loads((made.path / "report.json").read_text())
    assert report["file"]["format"] == "prompt-completion"
    assert run_stage(Dataset(path=path, holdout=0.2)).digest == made.digest
    assert run_stage(Dataset(path=path, holdout=0.2, seed=1)).digest != made.digest


def test_holds_out_a_number_of_rows(path: Path, run_stage: RunStage) -> None:
    assert run_stage(Dataset(path=path, holdout=7)).metrics["test"] == 8
    none = run_stage(Dataset(path=path, holdout=0))
    assert none.metrics["test"] == 0
    assert none.ctx.progress.lines == ["no row is held out; the test split is empty"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="all rows are held out"):
        run_stage(Dataset(path=path, holdout=400))


def test_a_test_file_keeps_its_rows_out_of_training(
    path: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    test = jsonl(tmp_path / "t.jsonl", [exchange("0", "0"), exchange("new"), exchange("new")])
    made = run_stage(Dataset(path=path, test_path=test))
    assert questions(made, "test") == ["0", "new"]
    assert "0" not in questions(made, "train")
    assert made.metrics["train"] == 398 and made.metrics["dropped"] == {"also in the test file": 2}
    assert made.ctx.progress.lines == [  # type: ignore[attr-defined]
        "t.jsonl: 1 (at 3) dropped: duplicate",
        "x.jsonl: 2 (at 1, 2) dropped: also in the test file",
    ]
    report = json.loads((made.path / "report.json").read_text())
    assert report["test_file"]["dropped"]["duplicate"] == {"count": 1, "lines": [3]}


def test_a_test_file_that_holds_everything_leaves_nothing(path: Path, run_stage: RunStage) -> None:
    with pytest.raises(DataError, match=r"no usable row.*\n  400 \(at 1, .*also in the test file"):
        run_stage(Dataset(path=path, test_path=path))


def test_a_continuation_stays_with_its_beginning(tmp_path: Path, run_stage: RunStage) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(40):
        first = [
            {"role": "user", "content": f"q{number}"},
            {"role": "assistant", "content": f"a{number}"},
        ]
        more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}]
        rows += [{"messages": first}, {"messages": first + more}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    made = run_stage(Dataset(path=path, holdout=0.3))
    train, test = questions(made, "train"), questions(made, "test")
    assert test and not set(train) & set(test)
    other = jsonl(tmp_path / "t.jsonl", rows[:2])
    made = run_stage(Dataset(path=path, test_path=other))
    assert (made.metrics["train"], made.metrics["test"]) == (78, 2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "sharegtp"}, "did you mean 'sharegpt'"),
        ({"holdout": 1.5}, "a fraction below 1 or whole rows, not 1.5"),
        ({"holdout": -1}, "greater than or equal to 0"),
        ({"path": "nowhere.jsonl"}, "no such file or folder"),
        ({"test_path": "x.jsonl", "holdout": 0.1}, "either 'holdout' or 'test_path'"),
    ],
)
def test_settings_that_cannot_work(
    path: Path, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(ValidationError, match=reason):
        Dataset.model_validate({"path": "x.jsonl", **settings})


def test_settings_survive_being_saved(path: Path) -> None:
    stage = Dataset(path=path, test_path=path)
    assert Dataset.model_validate(stage.model_dump()) == stage


def test_real_files(data_dir: Path, run_stage: RunStage) -> None:
    gsm8k = data_dir / "gsm8k"
    made = run_stage(Dataset(path=gsm8k / "train.jsonl", test_path=gsm8k / "test.jsonl"))
    assert (made.metrics["train"], made.metrics["test"]) == (7473, 1319)
