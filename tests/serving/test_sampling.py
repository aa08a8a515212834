"""The defaults of a bundle, checked when it is opened and not in every request."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifecycle.errors import CheckpointError
from serving.sampling import FILE, Defaults


def load(folder: Path, text: str) -> Defaults:
    (folder / FILE).write_text(text)
    return Defaults.load(folder)


def test_what_a_bundle_says(tmp_path: Path) -> None:
    assert Defaults.load(tmp_path) == Defaults()
    text = (
        '{"temperature": 0.5, "top_k": -1, "min_p": null, "max_new_tokens": 7, "eos_token_id": 2}'
    )
    assert load(tmp_path, text) == Defaults(temperature=0.5, max_tokens=7)
    assert load(tmp_path, '{"do_sample": false, "temperature": 0.5}').temperature == 0


@pytest.mark.parametrize(
    "text",
    [
        '{"temperature": -1}',
        '{"temperature": NaN}',
        '{"temperature": "hot"}',
        '{"top_p": 7}',
        '{"top_k": 1.5}',
        '{"max_new_tokens": "x"}',
        '{"max_new_tokens": 0}',
        "[]",
        "{",
    ],
)
def test_what_cannot_be_sampled_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path, text)
