from __future__ import annotations

import textwrap
from collections import Counter

import pytest

from lifecycle.data.package_task import Question, ask_packages, library_functions
from lifecycle.data.python_source import (
    HOLDOUT,
    Function,
    functions,
    language_reference,
    library_fingerprint,
    read_source,
    source_files,
    without,
)
from lifecycle.data.split import is_held_out
from lifecycle.errors import DataError

SOURCE = textwrap.dedent('''\
    """Form feeds and odd separators are no line ends here: \f\x1c."""
    import sys

    if sys.platform:
        @decorated(
            1)
        async def first(a):
            def inner(): pass
            return inner

    class Outer:
        class Inner:
            def second(self): return 2

        def third(self):
            # comment
            return "\\x0c"
    ''')


def test_finds_the_outermost_functions() -> None:
    found = functions("pkg/mod.py", SOURCE)
    assert [function.name for function in found] == [
        "pkg/mod.py:first",
        "pkg/mod.py:Outer.Inner.second",
        "pkg/mod.py:Outer.third",
    ]
    assert {function.package for function in found} == {"pkg"}
    assert found[0].source.startswith("@decorated(\n    1)\nasync def first(a):\n    def inner")
    assert found[2].source == 'def third(self):\n    # comment\n    return "\\x0c"'


def test_removes_functions_and_nothing_else() -> None:
    first, second, third = functions("mod.py", SOURCE)
    left = without(SOURCE, [first, third])
    assert "decorated" not in left and "inner" not in left and "comment" not in left
    assert second.source in left and left.startswith('"""Form feeds') and "class Outer" in left
    assert without(SOURCE, []) == SOURCE


def test_what_does_not_parse_has_no_functions() -> None:
    assert functions("x.py", "def f(:") == []


def test_the_library_is_there_on_every_machine() -> None:
    assert set(library_fingerprint()) == {"python", "library"}
    files = source_files()
    assert "asyncio/locks.py" in files and len(files) > 300
    assert not any(name.startswith(("test/", "idlelib/", "_sysconfigdata")) for name in files)
    assert len(language_reference()) > 50


def test_no_held_out_function_is_in_the_rest_of_its_file() -> None:
    for name in ("asyncio/base_events.py", "email/message.py"):
        text = read_source(source_files()[name])
        found = functions(name, text)
        held_out = [function for function in found if is_held_out(function.key, HOLDOUT)]
        assert held_out
        left = " ".join(without(text, held_out).split())
        assert not [f.name for f in held_out if len(f.key) > 80 and f.key in left]
        assert all(f.key in left for f in found if f not in held_out)


def function(package: str, source: str) -> Function:
    return Function(package, f"{package}.py:f", source, 1, 1)


def ask(found: list[Function], **settings: int) -> tuple[list[Question], dict[str, int]]:
    options = {"max_chars": 30, "min_chars": 10, "max_per_package": None, "seed": 0} | settings
    questions = ask_packages(found, holdout=HOLDOUT, **options)  # type: ignore[arg-type]
    return questions.kept, dict(questions.dropped)


def test_a_question_has_one_answer_and_is_in_one_split() -> None:
    head = "def method(self, argument):   "
    tails = [f"return {i}" for i in range(100)]
    keys = {is_held_out(f"def method(self, argument): {tail}", HOLDOUT): tail for tail in tails}
    found = [
        function("a", "def f(): 1"),
        function("a", "def f():  1"),
        function("a", "def shared(): pass"),
        function("b", "def shared():   pass"),
        function("b", "def b()"),
        function("a", head + keys[True]),
        function("a", head + keys[False]),
    ]
    kept, dropped = ask(found)
    assert [(q.head, q.package) for q in kept] == [("def f(): 1", "a")]
    assert dropped == {
        "copies": 1,
        "in several packages": 2,
        "in both splits": 2,
        "too short": 1,
    }


def test_a_cap_takes_from_both_splits_alike() -> None:
    found = [function("a", f"def function_{i}(self): return {i}") for i in range(4000)]
    kept, dropped = ask(found, max_per_package=1000, max_chars=300)
    assert Counter(q.package for q in kept) == {"a": 1000}
    assert dropped["over the most per package"] == 3000
    assert 0.12 < sum(q.held_out for q in kept) / 1000 < 0.18
    assert kept != ask(found, max_per_package=1000, max_chars=300, seed=1)[0]


def test_an_unknown_package_names_the_near_one() -> None:
    with pytest.raises(DataError, match="no functions of 'asincio'; did you mean 'asyncio'"):
        list(library_functions(["asincio"]))
