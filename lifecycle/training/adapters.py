"""Adapters: parameter-efficient fine-tuning methods, as settings. Loaded without PyTorch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lifecycle.pipeline.registry import ADAPTERS, Plugin

if TYPE_CHECKING:
    from peft import PeftConfig


class Adapter(Plugin):
    """A method that trains a few new weights beside a frozen model."""

    group: ClassVar[str] = ADAPTERS

    @abstractmethod
    def peft_config(self) -> PeftConfig:
        """The method in the terms of PEFT, which puts it on the model."""


class Lora(Adapter):
    """Low-rank updates of linear layers (Hu et al. 2021)."""

    use: str = "lora"
    """The method."""
    r: int = Field(default=16, ge=1)
    """Rank of the updates."""
    alpha: float = Field(default=32.0, gt=0)
    """Updates are scaled by `alpha / r`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that its update does not see in training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers, such as `[q_proj, v_proj]`; `all-linear` is all but the output
    head."""
    rslora: bool = False
    """Scale by `alpha / sqrt(r)` instead, for high ranks (Kalajdzievski 2023)."""

    def peft_config(self) -> PeftConfig:
        from peft import LoraConfig

        targets = self.target_modules
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  # divided by r only
            lora_dropout=self.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=self.rslora,
            task_type="CAUSAL_LM",
        )
