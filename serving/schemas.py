"""Request bodies of the OpenAI API, checked strictly.

A field that the API knows and this server does not is refused, unless its value asks for
nothing: silently leaving out a tool or a penalty would give a wrong answer. Fields that cannot
change an answer (`user`, `metadata`, …) are taken and ignored. A field that nobody knows is
refused with the nearest known name. `null` means the default, as in the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lifecycle.engines.requests import LONGEST_REPEAT
from lifecycle.pipeline.suggest import did_you_mean
from serving.fields import (
    MAX_ITEMS,
    Biases,
    Choices,
    Content,
    Prompts,
    Schema,
    Stops,
    Text,
    only,
    printable,
)

MAX_CHOICES = 128
MAX_TIMEOUT = 1e6
"""Seconds."""

_INT64 = 2**63


class Body(BaseModel):
    """A request's body, or a part of it."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _known_and_given(cls, data: object) -> object:
        """Refuse unknown fields with the near match, and drop those that are null."""
        if not isinstance(data, Mapping):
            return data
        fields = cast("Mapping[str, object]", data)
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in fields:
            if name not in known:
                shown = printable(name)
                raise PydanticCustomError(
                    "unknown_field",
                    "unknown field{hint}",
                    {"param": shown, "hint": did_you_mean(shown, known)},
                )
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: Any = None


class JsonSchemaFormat(Body):
    """`response_format.json_schema`. The schema always holds, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None
    description: Text | None = None


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchemaFormat | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _goes_with_its_type(
        cls, value: JsonSchemaFormat | None, info: ValidationInfo
    ) -> JsonSchemaFormat | None:
        kind = info.data.get("type")
        if kind is not None and (kind == "json_schema") != (value is not None):
            word = "needed" if value is None else "only allowed"
            raise PydanticCustomError(
                "json_schema", '{word} with "type": "json_schema"', {"word": word}
            )
        return value


class StructuredOutputs(Body):
    """`structured_outputs`, as in vLLM: exactly one of them."""

    json_: Annotated[Schema, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    """A grammar in llguidance's form of Lark."""

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise PydanticCustomError(
                "structured_outputs", "needs exactly one of 'json', 'regex', 'choice' and 'grammar'"
            )
        return self


class GenerationBody(Body):
    """What both routes that generate take."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(default=None, ge=-1)
    """0 and -1 keep all tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    dry_multiplier: float | None = Field(default=None, ge=0, le=100)
    dry_base: float | None = Field(default=None, ge=1, le=100)
    dry_allowed_length: int | None = Field(default=None, ge=1, le=LONGEST_REPEAT)
    logit_bias: Biases = {}
    """By token id, spelled as a string as JSON wants its keys."""
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field(default=[], max_length=64)

    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    """Lower ones go first; those below 0 only where the server allows them."""
    timeout: float | None = Field(default=None, gt=0, le=MAX_TIMEOUT)
    """Seconds after which the answers end as they are."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    """This one and those below are vLLM's older names of what `structured_outputs` holds."""
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    cache_salt: Annotated[Text, Field(max_length=256)] = ""
    """Prompts share what is cached of them only with prompts of the same salt and API key."""

    user: Any = None

    @field_validator("stream_options")
    @classmethod
    def _only_in_a_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", 'only allowed with "stream": true')
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_in_a_stream(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise PydanticCustomError("prompt_logprobs", 'not together with "stream": true')
        return value

    @property
    def num_answers(self) -> int:
        """How many answers are generated to each prompt."""
        return self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Text | None = None

    tool_calls: Annotated[Any, only([])] = []
    function_call: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    refusal: Any = None
    annotations: Any = None

    @property
    def as_template_input(self) -> dict[str, str]:
        """The message as chat templates read it; they know `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_ITEMS)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    tools: Annotated[Any, only([])] = []
    tool_choice: Annotated[Any, only("none", "auto")] = "none"
    functions: Annotated[Any, only([])] = []
    function_call: Annotated[Any, only("none", "auto")] = "none"
    modalities: Annotated[Any, only(["text"])] = ["text"]
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = "none"
    verbosity: Annotated[Any, only("medium")] = "medium"
    moderation: Annotated[Any, only()] = None
    store: Annotated[Any, only(False)] = False

    parallel_tool_calls: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") is not None:
            raise PydanticCustomError("limits", "not together with max_tokens, its older name")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", 'only allowed with "logprobs": true')
        return value


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0)
    """0 asks about the prompt alone."""
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    suffix: Annotated[Any, only("")] = ""

    @field_validator("echo")
    @classmethod
    def _scores_are_no_stream(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("logprobs") is not None and info.data.get("stream"):
            raise PydanticCustomError("echo", 'with logprobs not together with "stream": true')
        return value

    @field_validator("best_of")
    @classmethod
    def _more_than_are_given(cls, value: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n", 1)
        if value is not None and value < n:
            raise PydanticCustomError("best_of", "must be n, {n}, or more", {"n": n})
        if value is not None and value > n and info.data.get("stream"):
            raise PydanticCustomError("best_of", 'more than n not together with "stream": true')
        return value

    @model_validator(mode="after")
    def _asks_for_something(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise PydanticCustomError(
                "max_tokens",
                "0 is only allowed with echo or prompt_logprobs; give 1 or more",
                {"param": "max_tokens"},
            )
        return self

    @property
    def num_answers(self) -> int:
        return self.best_of or self.n
