"""Request bodies of the routes that load and unload adapters."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from serving.fields import Text
from serving.schemas import Body

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]


class LoadAdapterBody(Body):
    """`POST /v1/load_lora_adapter`."""

    lora_name: Name
    """What requests give as their model."""
    lora_path: Annotated[Text, Field(min_length=1, max_length=1024)]
    """A PEFT folder inside the server's adapter directory, relative to it or absolute."""
    load_inplace: bool = False
    """Whether the name may be in use: it stands for the new adapter then."""


class UnloadAdapterBody(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[Text, Field(max_length=1024)]
    lora_int_id: Any = None
