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
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lifecycle.engines.base import LONGEST_REPEAT
from lifecycle.pipeline.suggest import did_you_mean

MAX_CHOICES = 128
MAX_ITEMS = 2048
"""Messages of a chat, prompts of a completion. A wrong item costs an error of over 1 kB, so that
a body of 4 MB with a million of them would take gigabytes."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024

MAX_TIMEOUT = 1e6
"""Seconds."""

_INT64 = 2**63


def _only(*neutral: object) -> AfterValidator:
    """A field of the API that this server does not have: only values that ask for nothing."""

    def check(value: object) -> object:
        if value not in neutral:
            raise PydanticCustomError(
                "unsupported", "this server does not support it; leave it out"
            )
        return value

    return AfterValidator(check)


def _is_text(value: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and cannot be tokenised."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "text", "is no Unicode text: it holds a lone surrogate"
        ) from error
    return value


def _printable(name: str) -> str:
    return name[:64].encode(errors="backslashreplace").decode()


Text = Annotated[str, AfterValidator(_is_text)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _content(value: object) -> object:
    """A message's content as one string; parts of text are joined by line breaks."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in cast("list[object]", value):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise PydanticCustomError("content", "only parts of type 'text' are supported")
    return "\n".join(texts)


def _prompts(value: object) -> list[str] | list[list[int]]:
    """A prompt in any of its four forms as a list of strings or of lists of token ids."""
    match value:
        case str():
            return [_is_text(value)]
        case [*items] if items and all(type(item) is int for item in items):
            return [cast("list[int]", items)]
        case [*items] if len(items) > MAX_ITEMS:
            raise PydanticCustomError("prompt", "has more than {most} prompts", {"most": MAX_ITEMS})
        case [*items] if items and all(isinstance(item, str) for item in items):
            return [_is_text(item) for item in cast("list[str]", items)]
        case [*items] if items and all(_is_tokens(item) for item in items):
            return cast("list[list[int]]", items)
        case _:
            raise PydanticCustomError(
                "prompt",
                "must be a string, a list of strings, a list of token ids or a list of such lists",
            )


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int for item in cast("list[object]", value)
    )


def _by_token(value: object) -> object:
    """JSON has no keys but strings."""
    if not isinstance(value, Mapping):
        return value
    pairs = cast("Mapping[str, object]", value)
    if len(pairs) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", "has more than {most}", {"most": MAX_BIASES})
    found: dict[int, object] = {}
    for key, bias in pairs.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 20) or str(int(key)) != key:
            shown = {"key": _printable(key)}
            raise PydanticCustomError("logit_bias", "'{key}' is no token id", shown)
        found[int(key)] = bias
    return found


def _schema(value: object) -> object:
    """What is in a schema is seen to where it is compiled."""
    if isinstance(value, str):
        return _is_text(value)
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("json_schema", "must be a JSON schema: an object")
    return cast("object", value)


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
                shown = _printable(name)
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
    schema_: Annotated[Any, AfterValidator(_schema), Field(alias="schema")]
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

    json_: Annotated[Any, AfterValidator(_schema), Field(alias="json")] = None
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
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_as_list),
    ] = []
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
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_by_token)] = {}
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
    guided_json: Annotated[Any, AfterValidator(_schema)] = None
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
    content: Annotated[Text, BeforeValidator(_content)]
    name: Text | None = None

    tool_calls: Annotated[Any, _only([])] = []
    function_call: Annotated[Any, _only()] = None
    audio: Annotated[Any, _only()] = None
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

    tools: Annotated[Any, _only([])] = []
    tool_choice: Annotated[Any, _only("none", "auto")] = "none"
    functions: Annotated[Any, _only([])] = []
    function_call: Annotated[Any, _only("none", "auto")] = "none"
    modalities: Annotated[Any, _only(["text"])] = ["text"]
    audio: Annotated[Any, _only()] = None
    prediction: Annotated[Any, _only()] = None
    web_search_options: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = "none"
    verbosity: Annotated[Any, _only("medium")] = "medium"
    moderation: Annotated[Any, _only()] = None
    store: Annotated[Any, _only(False)] = False

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

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(default=None, ge=0)
    """0 asks about the prompt alone."""
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    suffix: Annotated[Any, _only("")] = ""

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
