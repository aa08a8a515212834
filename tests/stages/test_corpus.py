from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lifecycle.data.python_source import library_fingerprint
from lifecycle.errors import DataError
from lifecycle.stages.corpus import Corpus
from tests.conftest import RunStage


def texts(artifact: Any, split: str) -> list[str]:
    return [row["text"] for row in artifact.rows(split)]


def test_paragraphs_of_a_file_are_split_and_counted(tmp_path: Path, run_stage: RunStage) -> None:
    path = tmp_path / "x.txt"
    path.write_text("\n\n".join(["same", "", "same", *(f"paragraph {i}" for i in range(99))]))
    made = run_stage(Corpus(path=path, unit="paragraph"))
    train, test = texts(made, "train"), texts(made, "test")
    assert sorted([*train, *test]) == sorted(["same", *(f"paragraph {i}" for i in range(99))])
    assert 5 < len(test) < 30
    assert made.metrics == {
        "train_documents": len(train),
        "test_documents": len(test),
        "train_characters": sum(map(len, train)),
        "test_characters": sum(map(len, test)),
        "duplicates": 1,
    }
    assert run_stage(Corpus(path=path, unit="paragraph")).digest == made.digest


def test_folders_and_jsonl(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub/a.txt").write_text("a\r\n")
    (tmp_path / "x.jsonl").write_text('{"body": "c"}\n')
    made = run_stage(Corpus(path=tmp_path, holdout=0))
    assert list(made.rows("train")) == [
        {"text": "b", "source": "b.txt:1"},
        {"text": "a\n", "source": "sub/a.txt:1"},
    ]
    every = run_stage(Corpus(path=tmp_path, holdout=0, pattern="*.*", field="body"))
    assert texts(every, "train") == ["b", "c"]


def test_one_document_cannot_be_split_and_says_so(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "x.txt").write_text("all of it\n\nin one")
    made = run_stage(Corpus(path=tmp_path / "x.txt"))
    assert "'unit' is paragraph or line" in made.ctx.progress.lines[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.JSONL", '{"text": "a"}\n'),
        ("x.ndjson", '{"text": "a"}\n'),
        ("x.json", '[{"text": "a"}]'),
        ("x.csv", "text,n\na,1\n"),
        ("x.TSV", "text\tn\na\t1\n"),
    ],
)
def test_every_file_with_rows_is_read_by_row(
    tmp_path: Path, run_stage: RunStage, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert texts(run_stage(Corpus(path=tmp_path / name, holdout=0)), "train") == ["a"]


def test_a_text_that_is_held_out_whole_says_how_to_cut_it(
    tmp_path: Path, run_stage: RunStage
) -> None:
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(DataError, match=r"all documents, 1, are held out; .* 'unit' is paragraph"):
        run_stage(Corpus(path=tmp_path / "x.txt", holdout=0.999))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b" \n", "there is no text to train on$"),
        ("x.txt", b"a\xff", "byte 0xff at offset 1"),
        ("x.jsonl", b'{"text": "\\ud83d"}', "line 1: text has half of a surrogate pair"),
        ("x.jsonl", b'{"body": "c"}', r"line 1: no text in 'text' \(its keys: body\)"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, run_stage: RunStage, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run_stage(Corpus(path=tmp_path / name))
    with pytest.raises(DataError, match=r"no file of .* matches the pattern '\*\.md'"):
        run_stage(Corpus(path=tmp_path, pattern="*.md"))


@pytest.mark.parametrize("settings", [{}, {"path": ".", "source": "python-stdlib"}])
def test_exactly_one_origin(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="either 'path' or 'source: python-stdlib'"):
        Corpus.model_validate(settings)


def test_only_the_library_is_fingerprinted(tmp_path: Path) -> None:
    assert Corpus(path=tmp_path).fingerprint() == {}
    assert Corpus(source="python-stdlib").fingerprint() == library_fingerprint()


@pytest.mark.parametrize("pattern", ["", "../*.txt", "/etc/*.conf", "a/../../b"])
def test_a_pattern_cannot_leave_the_folder(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValidationError, match="must match files below 'path'"):
        Corpus.model_validate({"path": tmp_path, "pattern": pattern})
