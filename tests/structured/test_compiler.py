"""Grammars are compiled beside everything else, kept, and given up on in time."""

import threading
import time
from collections.abc import Iterator

import pytest
from small_text import EOS, make_tokenizer
from walks import make_table

from jaxllm.structured import StructuredOutputsParams, compiler
from jaxllm.structured.compiler import GrammarCompiler
from jaxllm.structured.grammar import Grammar


@pytest.fixture
def compiling() -> Iterator[GrammarCompiler]:
    found = GrammarCompiler(lambda: make_table(make_tokenizer(), {EOS}))
    yield found
    found.close()


def regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


def test_a_grammar_is_compiled_once(compiling: GrammarCompiler) -> None:
    assert compiling.compile(regex("a+")) is compiling.compile(regex("a+"))
    assert compiling.compile(regex("a+")) is not compiling.compile(regex("b+"))
    assert compiling.compile(regex("a+")).tokens is compiling.compile(regex("b+")).tokens


def test_those_used_last_are_kept(compiling: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MOST_KEPT", 2)
    a, b = compiling.compile(regex("a")), compiling.compile(regex("b"))
    assert compiling.compile(regex("a")) is a
    compiling.compile(regex("c"))
    assert compiling.compile(regex("a")) is a
    assert compiling.compile(regex("b")) is not b


def test_failures_are_kept_and_told_to_each(compiling: GrammarCompiler) -> None:
    compiling.compile(regex("a"))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"structured_outputs.regex: "):
            compiling.compile(regex("(?!a)"))


def test_others_do_not_wait(compiling: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    release, make = threading.Event(), Grammar.__init__

    def slow(self, tokens, params, *others) -> None:
        if params.regex == "slow":
            release.wait(20)
        make(self, tokens, params, *others)

    monkeypatch.setattr(Grammar, "__init__", slow)
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 0.2)
    future = compiling.begin(regex("slow"))
    begin = time.monotonic()
    compiling.compile(regex("quick"))
    with pytest.raises(ValueError, match=r"structured_outputs.regex: not compiled within"):
        compiling.compile(regex("slow"))
    assert time.monotonic() - begin < 5
    release.set()
    assert compiling.compile(regex("slow")) is future.result()


def test_long_chains_of_definitions_do_not_end_the_process(compiling: GrammarCompiler) -> None:
    """Each leads to the next by recursion, thousands deep: on a stack of 8 MB the process would die."""
    rules = [f"r{i}: r{i + 1}" for i in range(9000)]
    compiling.compile(StructuredOutputsParams(grammar="\n".join(["start: r0", *rules, 'r9000: "a"'])))
    definitions = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(4000)}
    definitions["a4000"] = {"type": "null"}
    compiling.compile(StructuredOutputsParams(json={"$defs": definitions, "$ref": "#/$defs/a0"}))


def test_closing_ends_the_threads(compiling: GrammarCompiler) -> None:
    others = set(threading.enumerate())
    compiling.compile(regex("a"))
    own = {thread for thread in set(threading.enumerate()) - others if thread.name.startswith("grammar")}
    assert own
    compiling.close()
    end = time.monotonic() + 5
    while any(thread.is_alive() for thread in own):
        assert time.monotonic() < end
        time.sleep(0.01)
