"""Flags made from dataclass fields."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from jaxllm.cli.flags import add_flags, field_docstrings, given
from jaxllm.cli.main import command_parser, main
from jaxllm.cli.options import DECIDED_BY_COMMANDS
from jaxllm.config import option_fields
from jaxllm.sampling.params import SamplingParams


@dataclasses.dataclass
class Sample:
    whole: int = 3
    """A whole number, 5% of something."""
    maybe: float | None = None
    """A number or nothing."""
    switch: bool = True
    """On or off."""
    either: bool | None = None
    """On, off or up to the engine."""
    folder: Path | None = None
    """A folder."""
    kind: Literal["one", "two"] = "one"
    """One of two."""
    words: str | Sequence[str] | None = None
    """Some words."""
    table: Mapping[int, float] | None = None
    """A table."""


def parse(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    fields = dataclasses.fields(Sample)
    add_flags(parser, Sample, fields)
    return given(parser.parse_args(argv), fields)


def test_nothing_given_leaves_nothing():
    assert parse() == {}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--whole", "4"], {"whole": 4}),
        (["--maybe", "0.5"], {"maybe": 0.5}),
        (["--no-switch"], {"switch": False}),
        (["--either"], {"either": True}),
        (["--folder", "a/b"], {"folder": Path("a/b")}),
        (["--kind", "two"], {"kind": "two"}),
        (["--words", "a b", "--words", "c"], {"words": ["a b", "c"]}),
        (["--table", '{"1": 2.5}'], {"table": {"1": 2.5}}),
    ],
)
def test_each_type_is_read(argv: list[str], expected: dict[str, Any]):
    assert parse(*argv) == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--whole", "x"],
        ["--whole", "1.5"],
        ["--kind", "three"],
        ["--table", "[1]"],
        ["--table", "{"],
        ["--switch", "yes"],
    ],
)
def test_what_cannot_be_read_is_an_error_of_usage(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err or argv[1] in capsys.readouterr().err


def test_help_has_the_text_and_the_default():
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample, dataclasses.fields(Sample))
    text = parser.format_help()
    assert "A whole number, 5% of something. (default: 3)" in text
    assert "A number or nothing.\n" in text


def test_a_type_without_a_form_is_refused():
    @dataclasses.dataclass
    class Odd:
        thing: complex = 0j
        """A thing."""

    with pytest.raises(TypeError, match="thing"):
        add_flags(argparse.ArgumentParser(), Odd, dataclasses.fields(Odd))


def test_field_docstrings_belong_to_the_field_above():
    assert field_docstrings(Sample)["switch"] == "On or off."
    assert list(field_docstrings(Sample)) == [f.name for f in dataclasses.fields(Sample)]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def command_flags(command: str) -> set[str]:
    return flags_of(command_parser(command))


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_option_of_the_engine_has_a_flag(command: str):
    wanted = {"--" + f.name.replace("_", "-") for _, f in option_fields() if f.metadata["flag"]}
    assert (
        len(wanted) == len(option_fields()) - 1  # all but `model`, which is MODEL
    )
    assert wanted <= command_flags(command)


def test_every_sampling_parameter_has_a_flag():
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert names >= DECIDED_BY_COMMANDS
    wanted = {"--" + name.replace("_", "-") for name in names - DECIDED_BY_COMMANDS}
    assert wanted <= command_flags("generate")
    assert wanted - command_flags("chat") == {"--n", "--logprobs", "--prompt-logprobs"}


def test_one_seed_serves_the_engine_and_the_requests(engine: type):
    main(["generate", "m", "hi", "--seed", "11"])
    assert engine.made.options["seed"] == 11
    assert engine.made.requests[0][1].seed == 11
