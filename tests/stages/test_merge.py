from __future__ import annotations

import pytest

from lifecycle.errors import StageError
from lifecycle.kinds import HfModel
from lifecycle.stages.merge import Merge
from tests.conftest import RunStage


def test_a_model_without_an_adapter_is_refused(run_stage: RunStage, learnt: HfModel) -> None:
    with pytest.raises(StageError, match="'base' has no adapter to merge; use 'base' itself"):
        run_stage(Merge.model_validate({"model": "base"}), base=learnt)
