"""Grammars by themselves: what they let through, what is refused, and what they may take."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from benchmarks.json_schema import run
from lifecycle.engines.grammar.compiler import GrammarCompiler
from lifecycle.engines.grammar.schema import check_schema
from lifecycle.engines.grammar.spec import GrammarSpec
from lifecycle.errors import MissingExtraError, RequestError
from tests.engines.grammars import HOSTILE, PERSON, accepts, compiler_of, draw, encode

END = 2
BYTE_LEVEL = Path("minimind_tokenizer", "tokenizer.json")


@pytest.fixture(scope="module", params=["stories260K/hf", "minimind_tokenizer"])
def made(data_dir: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A SentencePiece tokeniser and a byte-level one, with a model of more tokens."""
    path = data_dir / request.param / "tokenizer.json"
    with compiler_of(path, vocab_size=6_500) as made:
        yield made


@pytest.fixture(scope="module")
def compiler(data_dir: Path) -> Iterator[GrammarCompiler]:
    with compiler_of(data_dir / BYTE_LEVEL) as (_, made):
        yield made


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (
            GrammarSpec("choice", ("yes", "no", 'a "naïve"\n日本')),
            ["yes", "no", 'a "naïve"\n日本'],
            ["", "ye", "yess", "maybe"],
        ),
        (
            GrammarSpec("regex", r"[0-9]{2,4}(-[a-c]+)?"),
            ["12", "1234", "12-abc"],
            ["1", "12345", "12-", "12-d"],
        ),
        (GrammarSpec("choice", ("",)), [""], ["a"]),
        (GrammarSpec("choice", ("", "a", "a", "ab")), ["", "a", "ab"], ["b", "aa"]),
        (
            GrammarSpec("choice", tuple(f"item {n:04}" for n in range(2048))),
            ["item 0000", "item 2047"],
            ["", "item 2048", "item 000"],
        ),
        (
            GrammarSpec("lark", 'start: "(" start ")" | /[a-z]+/'),
            ["a", "((ab))"],
            ["", "(a", "a)", "A"],
        ),
        (
            GrammarSpec("json_object"),
            ["{}", '{"a":1}', '{"a": {"b": [1, 2.5e3, null]}, "c": "é\\n"}'],
            ["[]", "1", "{", '{"a":1,}', '{\n"a":1}', '{"a":  1}'],
        ),
        (
            GrammarSpec.of_schema(PERSON),
            [
                '{"name":"Ada","age":36,"tags":[],"kind":"cat"}',
                '{"name": "Ada", "age": 36, "tags": ["a"], "kind": null}',
            ],
            [
                '{"name":"Ada","age":151,"tags":[],"kind":"cat"}',
                '{"name":"Ada","tags":[],"kind":"cat"}',
                '{"age":36,"name":"Ada","tags":[],"kind":"cat"}',
                '{"name":"Ada","age":36,"tags":[],"kind":"cat","x":1}',
            ],
        ),
        (
            # However a declared name is spelled, it is none that is free.
            GrammarSpec.of_schema(
                {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}},
                    "patternProperties": {"^b": {"type": "integer"}},
                    "additionalProperties": {"type": "string"},
                }
            ),
            ['{"a":1,"b":2,"c":"x","\\u0001\\n":"\\u001f"}'],
            ['{"\\u0061":"x"}', '{"\\u0062":"x"}', '{"a":"x"}', '{"c":1}'],
        ),
        (
            GrammarSpec.of_schema({"type": "string", "pattern": r"^a.[[b&&~]c?$"}),
            ['"axb"', '"a~[c"', '"a.&"', '"a\\tb"'],
            ['"a\\rb"', '"a\u2028b"', '"a\\nb"', '"axd"'],
        ),
        (GrammarSpec.of_schema(True), ["1", '"a"', "[{}]"], ["", "a", "{"]),
    ],
    ids=lambda value: value.kind if isinstance(value, GrammarSpec) else "",
)
def test_what_may_be_written(made: Any, spec: GrammarSpec, good: list[str], bad: list[str]) -> None:
    tokenizer, compiler = made
    grammar = compiler.compile(spec)
    assert [text for text in good if not accepts(tokenizer, grammar, text)] == []
    assert [text for text in bad if accepts(tokenizer, grammar, text)] == []


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_drawn_is_valid(made: Any, seed: int) -> None:
    tokenizer, compiler = made
    constraint = compiler.compile(GrammarSpec.of_schema(PERSON)).constraint(frozenset({END}))
    answer = json.loads(tokenizer.decode(draw(constraint, END, seed)))
    jsonschema.validate(answer, PERSON)
    pattern = r"(ab|c[de]{1,3})+(x|yz)"
    constraint = compiler.compile(GrammarSpec("regex", pattern)).constraint(frozenset({END}))
    assert re.fullmatch(pattern, tokenizer.decode(draw(constraint, END, seed)))


def test_the_mask_covers_the_model_and_its_ends(made: Any) -> None:
    """Tokens that the tokeniser lacks never come; those that end the request do where it may end, other
    special tokens nowhere."""
    tokenizer, compiler = made
    grammar = compiler.compile(GrammarSpec("regex", "a+"))
    comma, a = (encode(tokenizer, text)[0] for text in ",a")
    both = grammar.constraint(frozenset({END, comma}))
    own = grammar.constraint(frozenset({comma}))
    for constraint in (both, own):
        mask = constraint.mask()
        assert mask.shape == (6_500,) and mask.dtype == np.bool_
        assert mask[a] and not mask[[END, comma]].any()
        assert not mask[tokenizer.get_vocab_size() :].any()
        constraint.accept(a)
    assert both.mask()[[a, END, comma]].all()
    assert own.mask()[[a, comma]].all() and not own.mask()[END]
    assert not own.is_complete
    own.accept(comma)
    assert own.is_complete and not own.forced() and not both.is_complete


def test_forced_tokens(made: Any) -> None:
    """They are those that the tokeniser makes of the forced text, and stop before what ends the request."""
    tokenizer, compiler = made
    grammar = compiler.compile(GrammarSpec.of_schema(PERSON))
    forced = list(grammar.constraint(frozenset({END})).forced())
    assert tokenizer.decode(forced).startswith('{"name"')
    whole = encode(tokenizer, '{"name":"Ada","age"')
    assert whole[: len(forced)] == forced
    assert grammar.constraint(frozenset({forced[1]})).forced() == forced[:1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("regex", "(?=a)b"), "look-around"),
        (GrammarSpec("lark", 'begin: "a"'), "start"),
        (GrammarSpec("lark", 'root ::= "a"'), "'::=' are not supported"),
        (GrammarSpec("lark", 'start: %json {"not": {}}'), "%json"),
        (GrammarSpec("choice", ()), "there are 0 choices"),
        (GrammarSpec.of_schema('{"minimum": NaN}'), "cannot be read: expected value"),
        (GrammarSpec.of_schema('{"maximum": 1e999}'), "cannot be read: number out of range"),
        (GrammarSpec.of_schema({"maximum": 10**400}), "cannot be read: number out of range"),
        (GrammarSpec.of_schema('{"const": "\\ud800"}'), "cannot be read: unexpected end of hex"),
        (GrammarSpec.of_schema({"const": "\ud800"}), "cannot be read"),
        (GrammarSpec.of_schema("{"), "no JSON"),
        (GrammarSpec.of_schema([]), "is no object"),
        (GrammarSpec.of_schema(False), "nothing is valid"),
        (GrammarSpec.of_schema({"type": "car"}), "car"),
        (GrammarSpec.of_schema({"not": {"type": "null"}}), "'not' at '/'"),
        (
            GrammarSpec.of_schema({"properties": {"a": {"items": {"uniqueItems": True}}}}),
            "'uniqueItems' at '/properties/a/items'",
        ),
        (GrammarSpec.of_schema({"type": "string", "minLenght": 3}), "'minLenght' at '/'"),
        (GrammarSpec.of_schema({"x-guidance": {"lenient": True}}), "'x-guidance'"),
        (GrammarSpec.of_schema({"type": "string", "format": "colour"}), "format: colour"),
        (GrammarSpec.of_schema({"$ref": "https://example.com/a.json"}), "nothing is fetched"),
        (GrammarSpec.of_schema({"$ref": "file:///etc/passwd"}), "nothing is fetched"),
        (GrammarSpec.of_schema({"type": "integer", "multipleOf": 99_999_989}), "at most 10000"),
        (GrammarSpec.of_schema({"type": "object", "minProperties": 2}), "'minProperties' of 2"),
        (GrammarSpec.of_schema({"pattern": "a[bc"}), "unclosed character class"),
        (
            GrammarSpec.of_schema(
                {
                    "properties": {"a\n": {"type": "integer"}},
                    "additionalProperties": False,
                    "patternProperties": {"^a": {}},
                }
            ),
            "there are no 'patternProperties'",
        ),
        (
            GrammarSpec.of_schema(
                {"required": ["a"], "patternProperties": {"b": {}}, "minProperties": 3}
            ),
            "one could come twice",
        ),
        (GrammarSpec.of_schema({"properties": {"a\n": {}}}), "control characters"),
        (GrammarSpec.of_schema({"pattern": "a[^]"}), "empty class"),
        (GrammarSpec.of_schema({"pattern": r"[+--\s]"}), "'--' in a class"),
        (GrammarSpec.of_schema({"oneOf": [{"minimum": 1}, {"minimum": 2}]}), "oneOf"),
    ],
)
def test_what_cannot_be_followed_is_named(
    compiler: GrammarCompiler, spec: GrammarSpec, words: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        compiler.compile(spec)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused(compiler: GrammarCompiler, name: str) -> None:
    """Some of them run for ever or overflow the stack where nothing stops them."""
    kind, value = HOSTILE[name]
    before = compiler.num_bytes
    with pytest.raises(RequestError):
        spec = GrammarSpec.of_schema(value) if kind == "json_schema" else GrammarSpec(kind, value)
        compiler.compile(spec)
    assert compiler.num_bytes == before
    assert compiler.compile(GrammarSpec("choice", ("a",)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("pattern", "outgrows"),
    [
        ("(a|a)*b", False),
        ("((a+)+)+b", False),
        ("(a|b)*a(a|b){30}", False),
        ("(.*a.{30}|.*b)*", True),
    ],
)
def test_hostile_patterns_are_followed_or_refused(
    compiler: GrammarCompiler, pattern: str, outgrows: bool
) -> None:
    """Refused while the answer is written: none grows without end, and no token waits for ever."""
    grammar, rng = compiler.compile(GrammarSpec("regex", pattern)), np.random.default_rng(0)
    refusal = pytest.raises(RequestError, match="outgrown its limits|too long to follow")
    constraint = grammar.constraint(frozenset({END}))
    with refusal if outgrows else nullcontext():
        for _ in range(300):
            allowed = np.flatnonzero(constraint.mask())
            constraint.accept(int(rng.choice(allowed[allowed != END])))
            constraint.forced()
            if constraint.is_complete:
                constraint = grammar.constraint(frozenset({END}))


@pytest.mark.parametrize("milliseconds", [3, 30])
def test_a_grammar_that_is_slow_to_follow_ends_its_answer(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, milliseconds: int
) -> None:
    """By a clock that goes on with each call: a mask, a token and a look for forced ones take three ticks,
    and a token earns 10 ms."""
    clock = count(0, milliseconds / 1000)
    monkeypatch.setattr("lifecycle.engines.grammar.constraint.thread_time", lambda: next(clock))
    constraint = compiler.compile(GrammarSpec("regex", "[ab]{300}")).constraint(frozenset({END}))
    tokens = 0
    try:
        while not constraint.is_complete:
            constraint.accept(int(constraint.mask().argmax()))
            assert not constraint.forced()
            tokens += 1
    except RequestError as error:
        assert "too long to follow" in str(error)
    assert constraint.is_complete == (milliseconds == 3)
    # What is spent before it is earned is a fifth of a second.
    assert milliseconds == 3 or tokens == 2


def test_a_grammar_that_has_outgrown_its_limits_is_made_anew(data_dir: Path) -> None:
    spec = GrammarSpec("regex", "(.*a.{30}|.*b.{29})*")
    with compiler_of(data_dir / BYTE_LEVEL, lexer_states=500) as (_, compiler):
        with pytest.raises(RequestError, match="fewer alternatives"):
            draw(compiler.compile(spec).constraint(frozenset()), END, seed=0)
        assert compiler.num_bytes == 0
        assert compiler.compile(spec).constraint(frozenset({END})).mask().any()


def test_grammars_are_kept_under_a_cap(data_dir: Path) -> None:
    first = GrammarSpec("choice", ("first",))
    with compiler_of(data_dir / BYTE_LEVEL, cache_bytes=24 << 20) as (_, compiler):
        kept = compiler.compile(first)
        assert kept.num_bytes > 6 << 20
        for n in range(8):
            assert compiler.compile(first) is kept
            compiler.compile(GrammarSpec("choice", (f"{n}",)))
            assert 0 < compiler.num_bytes <= 24 << 20
        for n in range(8, 11):
            compiler.compile(GrammarSpec("choice", (f"{n}",)))
        assert compiler.compile(first) is not kept


def test_one_grammar_has_a_cap(data_dir: Path) -> None:
    with compiler_of(data_dir / BYTE_LEVEL, grammar_bytes=1 << 20) as (_, compiler):
        with pytest.raises(RequestError, match="MiB, more than 1"):
            compiler.compile(GrammarSpec("json_object"))
        assert compiler.num_bytes == 0


def test_many_threads_compile(compiler: GrammarCompiler) -> None:
    specs = [GrammarSpec("regex", f"[a-z]{{{n % 5 + 1}}}") for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        grammars = list(pool.map(compiler.compile, specs))
    answers = [draw(grammar.constraint(frozenset({END})), END, seed=1) for grammar in grammars]
    assert answers[:5] * 8 == answers


def test_the_process_of_the_trial_ends_with_its_owner(data_dir: Path) -> None:
    with compiler_of(data_dir / BYTE_LEVEL) as (_, compiler):
        compiler.compile(GrammarSpec("choice", ("a",)))
        process = compiler._trial._process
        assert process is not None and process.poll() is None
    assert process.poll() is not None


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"lifecycle-toolkit\[serve\]"):
        GrammarCompiler("{}", 10, frozenset())


def test_a_tokeniser_that_is_not_supported() -> None:
    with pytest.raises(RequestError, match="cannot follow a grammar"):
        GrammarCompiler('{"version": "1.0"}', 10, frozenset())


def test_the_official_suite(data_dir: Path) -> None:
    """Of what compiles nothing invalid can be written, and what is drawn ends and is valid."""
    suite = data_dir / "json_schema_test_suite" / "draft2020-12"
    with compiler_of(data_dir / BYTE_LEVEL) as (tokenizer, compiler):
        report = run(suite, tokenizer, compiler, draws=12)
    assert report.compiled >= 180
    assert report.wrongly_accepted == []
    assert report.invalid_outputs == []
    assert report.incomplete == []
    assert report.complete >= 0.95 * report.drawn
    required = [what for what in report.not_accepted if not what.startswith("optional/")]
    # Where a format is wrong the suite, which takes it for a comment, has the instance valid.
    assert [what for what in required if not what.startswith("format: ")] == []


def test_schemas_below_a_long_name_take_no_memory_for_each() -> None:
    name = "\U0001f600" * 20_000
    schema: dict[str, Any] = {"properties": {name: {"anyOf": [True] * 20_000 + [1]}}}
    tracemalloc.start()
    with pytest.raises(RequestError, match=r"at '/properties/.{40,80}…/anyOf/20000' is no object"):
        check_schema(schema)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6
