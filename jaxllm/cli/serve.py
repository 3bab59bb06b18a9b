"""`jaxllm serve`: an OpenAI-compatible server."""

import argparse
import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import yaml

from jaxllm.cli.flags import add_flags, flag_name, given
from jaxllm.cli.following import follow_if_told
from jaxllm.cli.options import add_engine_flags, engine_options
from jaxllm.config import EngineConfig, option_fields
from jaxllm.engine.vllm_options import COMBINED, MEANINGLESS, REFUSED, translate
from jaxllm.server.config import PARTS, ServerConfig
from jaxllm.wording import how_to_install

_OWN = {field.name for part in PARTS.values() for field in dataclasses.fields(part)}
_VLLM = REFUSED.keys() | COMBINED | MEANINGLESS
_VLLM_ONLY = sorted(_VLLM - _OWN - {field.name for _, field in option_fields()})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser, model_may_lack=True)
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="MODEL, as a flag")
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        type=Path,
        help="flags from a file: their names without dashes in front, and values; those given here go first",
    )
    for name, part in PARTS.items():
        group = parser.add_argument_group(f"{name} options", part.__doc__)
        add_flags(group, part, dataclasses.fields(part), words=True)
    for name in _VLLM_ONLY:
        hidden = argparse.SUPPRESS
        parser.add_argument(
            flag_name(name), nargs="?", const=True, type=_json_or_text, default=hidden, help=hidden
        )


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    if arguments.config is not None:
        _add_from_file(arguments)
    model = arguments.model = arguments.model or arguments.model_flag
    if not model:
        arguments.usage_error("MODEL is missing: give it first, as --model, or in the --config file")
    options = _with_vllm_flags(arguments, engine_options(arguments, several_hosts=True))
    options.setdefault("progress", False)  # the log says how far loading is
    try:
        config = _server_config(arguments)
    except ValueError as error:
        arguments.usage_error(str(error))
        raise  # not reached: a usage error ends the program

    if follow_if_told(str(model), options):
        return 0
    try:
        from jaxllm.server.run import run as serve
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; for the server {how_to_install('server')}") from error

    return serve(config, EngineConfig.create(str(model), **options))


def _add_from_file(arguments: argparse.Namespace) -> None:
    """Adds the flags of the config file that were not given on the command line."""
    entries: Any = None
    try:
        entries = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) or {}
    except OSError as error:
        arguments.usage_error(arguments.parser.explain(error, arguments))
    except yaml.YAMLError as error:
        arguments.usage_error(f"--config: {error}")
    if not isinstance(entries, dict):
        arguments.usage_error(f"--config: {arguments.config}: must hold names of flags with their values")
    words = [word for name, value in entries.items() for word in _as_words(str(name), value)]
    for name, value in vars(arguments.parser.parse_args(words)).items():
        default = arguments.parser.get_default(name)
        if getattr(arguments, name, default) is default:
            setattr(arguments, name, value)


def _as_words(name: str, value: Any) -> list[str]:
    """An entry of the config file as it would stand on the command line."""
    flag = flag_name(name)
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _server_config(arguments: argparse.Namespace) -> ServerConfig:
    parts: dict[str, Any] = {
        name: part(**given(arguments, dataclasses.fields(part))) for name, part in PARTS.items()
    }
    config = ServerConfig(**parts)
    return dataclasses.replace(config, access=config.access.with_keys_of(os.environ))


def _with_vllm_flags(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """The engine's options, and what vLLM's flags ask for; says which of those have no meaning here."""
    found = {name: getattr(arguments, name) for name in _VLLM_ONLY if hasattr(arguments, name)}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            return translate(options | found)
        except NotImplementedError as error:
            arguments.usage_error(str(error))
            raise  # not reached: a usage error ends the program
