"""The program around the commands: exit codes, streams, start-up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.cli.main import BENCH_COMMANDS, COMMANDS, main


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in COMMANDS)


def test_the_help_of_bench_lists_what_there_is(capsys: pytest.CaptureFixture[str]):
    assert run("bench", "--help") == 0
    text = capsys.readouterr().out
    assert all(f"    {name.removeprefix('bench ')}" in text for name in BENCH_COMMANDS)


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name != "bench"), *BENCH_COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    assert run(*command.split(), "--help") == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "COMMAND"),
        (["bench"], "COMMAND"),
        (["bench", "nonsense"], "nonsense"),
        (["bench", "throughput"], "MODEL"),
        (["bench", "throughput", "m", "--dataset", "d", "--input-len", "3"], "--dataset"),
        (["bench", "throughput", "m", "--num-prompts", "0"], "--num-prompts"),
        (["nonsense"], "nonsense"),
        (["generate"], "MODEL"),
        (["generate", "m", "hi", "--no-such-flag"], "--no-such-flag"),
        (["generate", "m", "hi", "--page-size", "3"], "page_size=3"),
        (["generate", "m", "hi", "--temperature", "nan"], "temperature=nan"),
        (["generate", "m", "hi", "--max-tok", "5"], "--max-tok"),
        (["generate", "m", "hi", "--system", "s"], "--chat"),
        (["generate", "m", "hi", "--logprobs", "2"], "--json"),
        (["chat", "m", "--n", "2"], "--n"),
        (["chat", "m", "--num-hosts", "2", "--coordinator-address", "a"], "num_hosts=2"),
        (["bench", "latency", "m", "--num-hosts", "0"], "num_hosts=0"),
    ],
)
def test_errors_of_usage(argv: list[str], complaint: str, engine: type, capsys: pytest.CaptureFixture[str]):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err.splitlines()[0]
    assert err.splitlines()[1].startswith("see jaxllm")
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["generate"], "jaxllm generate: the following arguments are required: MODEL"),
        (
            ["generate", "m", "hi", "--temprature", "0.5"],
            "jaxllm generate: unrecognized arguments: --temprature 0.5; did you mean --temperature?",
        ),
        (
            ["complete", "hi", "--temprature=0.5"],
            "jaxllm complete: unrecognized arguments: --temprature=0.5; did you mean --temperature?",
        ),
        (["bench", "latency", "m", "--zzz"], "jaxllm bench latency: unrecognized arguments: --zzz"),
    ],
)
def test_a_wrong_line_is_told_in_one(
    argv: list[str], complaint: str, engine: type, capsys: pytest.CaptureFixture[str]
):
    assert run(*argv) == 2
    assert capsys.readouterr().err.splitlines()[0] == complaint


@pytest.mark.parametrize(
    ("argv", "code", "complaint"),
    [
        (["generate", "m", "hi", "--json-schema", "none"], 2, "--json-schema: none"),
        (["generate", "m", "hi", "--grammar-file", "."], 2, "--grammar-file: ."),
        (["serve", "m", "--config", "none"], 2, "--config: none"),
        (["serve", "m", "--api-key-file", "none"], 1, "--api-key-file: none"),
        (["serve", "m", "--ssl-keyfile", "none", "--ssl-certfile", "n"], 1, "--ssl-keyfile: none"),
        (["bench", "serve", "--dataset", "none"], 1, "--dataset: none"),
        (["run-batch", "m", "-i", "none", "-o", "o"], 1, "-i/--input-file: none"),
        (["run-batch", "m", "-i", "in", "-o", "none/o"], 1, "-o/--output-file: none/o"),
    ],
)
def test_a_file_that_cannot_be_had_is_named_with_its_flag(
    argv: list[str],
    code: int,
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    request = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {}}
    Path("in").write_text(json.dumps(request))
    monkeypatch.setattr("jaxllm.server.logs.configure", lambda config: None)
    assert run(*argv) == code
    name = " ".join(argv[: 2 if argv[0] == "bench" else 1])
    why = "Is a directory" if complaint.endswith(".") else "No such file or directory"
    assert f"jaxllm {name}: {complaint}: {why}\n" in capsys.readouterr().err


def test_a_host_without_an_address_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxllm.server.logs.configure", lambda config: None)
    assert run("serve", "m", "--host", "host.invalid") == 1
    assert "host='host.invalid': " in capsys.readouterr().err


def test_a_failure_is_one_line(
    engine: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "fail_with", ValueError("m: no such folder"))
    assert run("generate", "m", "hi") == 1
    assert capsys.readouterr() == ("", "jaxllm generate: m: no such folder\n")


def test_a_failure_without_a_message_is_named(
    engine: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "fail_with", MemoryError())
    assert run("generate", "m", "hi") == 1
    assert capsys.readouterr().err == "jaxllm generate: MemoryError\n"


def test_debug_raises_it(engine: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "fail_with", ValueError("m: no such folder"))
    with pytest.raises(ValueError, match="no such folder"):
        main(["generate", "m", "hi", "--debug"])


def test_an_interrupt_is_130(
    engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(engine, "fail_with", KeyboardInterrupt())
    assert run("generate", "m", "hi") == 130


def test_a_closed_pipe_is_no_traceback():
    program = Path(sys.executable).parent / "jaxllm"
    done = subprocess.run(
        f"{program} env --json | head -c 1", shell=True, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("{", "")


def test_the_programs_help_imports_nothing_heavy():
    code = (
        "import sys, jaxllm.cli.main as m; m.program_parser('jaxllm', m.COMMANDS).format_help();"
        "print([x for x in ('jax', 'numpy', 'transformers', 'flax') if x in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
