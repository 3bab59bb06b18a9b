"""Compiled grammars: what a constraint allows, whatever has been written so far."""

import json
import re
import threading
import time
from concurrent.futures import Executor
from decimal import Decimal, InvalidOperation
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from jaxllm.structured.matcher import Matcher
from jaxllm.structured.params import Constraint, StructuredOutputsParams
from jaxllm.structured.structural_tag import StructuralTagGrammar, grammars_of
from jaxllm.structured.tokens import TokenTable

WHITESPACE = r"([ \t]{1,4}|\r?\n[ \t]{0,40})"
"""Between tokens of JSON: some spaces, or a new line and its indentation. Where blank lines and any number of
spaces are allowed, small models write them until they have no tokens left."""
MOST_BYTES = 1 << 18
"""Of a constraint's text. Rules that lead from one to the next are followed by recursion, and so the bytes
limit what a thread's stack needs: see `STACK_BYTES` of the compiler."""
LARGEST_MULTIPLE = 10_000
"""The automaton of `multipleOf` has as many states: a million take 7 s and 300 MB. For 0.25 it is 25."""
LONGEST_FIRST_STEP = 0.5
"""Seconds of the processor. A step takes microseconds to a few milliseconds, and all requests wait for it."""
LONGEST_RENEWAL = 0.1
"""Seconds of the processor to compile a grammar once more, between two steps. Most take a millisecond."""
_LIMITS = LLParserLimits(
    max_lexer_states=50_000,  # of 0.4 kB: 20 MB for each compiled grammar
    max_grammar_size=200_000,
    verbose_errors=False,
)
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.\deE]+)')


class Grammar:
    """A constraint that has been compiled. May be shared between requests and threads.

    To be made in a thread whose stack holds the recursion, see `GrammarCompiler`.

    Args:
        tokens: the vocabulary.
        params: the constraint.
        deep: such a thread that has nothing else to do than to `renew`; by default the caller's own.

    Raises:
        ValueError: it cannot be compiled, nothing fits it, or that would take too long; the message begins
            with structured_outputs and the constraint's name.
    """

    def __init__(
        self, tokens: TokenTable, params: StructuredOutputsParams, deep: Executor | None = None
    ) -> None:
        self._deep = deep
        self.tokens = tokens
        self.params = params
        self._name = f"structured_outputs.{params.constraint}"
        self._lock = threading.Lock()
        self._source = self._read()
        if params.prefix is not None:
            self._source = _after(params.prefix, self._source)
        begin = time.thread_time()
        self._compiled = self._compile()
        self._compile_seconds = time.thread_time() - begin
        begin = time.thread_time()
        try:
            self.matcher().compute_mask()
        except ValueError as error:
            raise self.error("there is no text that fits, or none that can be found") from error
        if (seconds := time.thread_time() - begin) > LONGEST_FIRST_STEP:
            raise self.error(f"too complex, its first step takes {seconds:.1f} s; make it simpler")

    def matcher(self) -> Matcher:
        """Begins an output."""
        return Matcher(self, self._compiled)

    def renew(self, exhausted: LLMatcher) -> LLMatcher:
        """The grammar without what has been computed of it so far.

        States of the lexer are kept for all outputs, and when there are too many of them none goes on.

        Args:
            exhausted: what the caller has a copy of; another one may have renewed it already.

        Raises:
            ValueError: it takes so long to compile that the step loop cannot wait for it.
        """
        with self._lock:
            if self._compiled is exhausted:
                if self._compile_seconds > LONGEST_RENEWAL:
                    raise self.error("it has grown too large; make it simpler")
                deep = self._deep
                self._compiled = self._compile() if deep is None else deep.submit(self._compile).result()
            return self._compiled

    def error(self, what: str) -> ValueError:
        """An error that names the constraint."""
        return ValueError(f"{self._name}: {what}")

    def _read(self) -> str:
        """The constraint in the form that is compiled."""
        params = self.params
        if params.size > MOST_BYTES:
            raise self.error(f"{params.size} bytes; at most {MOST_BYTES} can be compiled")
        text = getattr(params, params.constraint)
        if isinstance(text, str):
            for multiple in _MULTIPLE.findall(text):
                if _num_states(multiple) > LARGEST_MULTIPLE:
                    what = f"at most {LARGEST_MULTIPLE} of its last decimal place are supported"
                    raise self.error(f"multipleOf {multiple}: {what}")
        try:
            return self._translate(params.constraint, text)
        except RecursionError:
            raise self.error("nested too deeply") from None
        except Exception as error:  # the converter from EBNF raises plain ones
            raise self.error(_short(str(error))) from error

    def _translate(self, constraint: Constraint, text: Any) -> str:
        match constraint:
            case "json" if self.params.disable_additional_properties:
                return self._schema(json.dumps(_closed(json.loads(text))))
            case "json":
                return self._schema(text)
            case "json_object":
                return self._schema('{"type": "object"}')
            case "regex":
                return LLMatcher.grammar_from_regex(text)
            case "choice":
                return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, text)))
            case "grammar":
                return LLMatcher.grammar_from_lark(any_to_lark(text))
            case "structural_tag":
                tag = StructuralTagGrammar(self.tokens.special_tokens, self._translate)
                return tag.write(json.loads(text))

    def _schema(self, schema: str) -> str:
        flexible = not self.params.disable_any_whitespace
        pattern = self.params.whitespace_pattern or WHITESPACE
        options = {"whitespace_pattern": pattern} if flexible else {"whitespace_flexible": False}
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # pyright: ignore[reportArgumentType]

    def _compile(self) -> LLMatcher:
        compiled = LLMatcher(self.tokens.compiled, self._source, log_level=0, limits=_LIMITS)
        if compiled.is_error():
            raise self.error(_short(compiled.get_error()))
        return compiled


def _after(prefix: str, source: str) -> str:
    """A grammar that begins with another one's text."""
    rest = grammars_of(source)
    rest[0]["name"] = "rest"
    begin = [{"lark_grammar": "start: @prefix @rest"}, {"name": "prefix", "lark_grammar": prefix}]
    return json.dumps({"grammars": [*begin, *rest]})


def _closed(schema: Any) -> Any:
    """A schema whose objects have no other properties than it lists, unless it speaks of others."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    if "properties" in schema and not schema.keys() & {"additionalProperties", "patternProperties"}:
        closed["additionalProperties"] = False
    return closed


def _num_states(multiple: str) -> Decimal:
    """How large an automaton is that recognises multiples of a number: as it is without its decimal point."""
    try:
        number = Decimal(multiple).normalize()
    except InvalidOperation:
        return Decimal(0)  # no number, as the compiler will say
    return abs(number.scaleb(max(0, -int(number.as_tuple().exponent))))


def _short(message: str) -> str:
    """A message without what is only for the library's own authors, in one line."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
