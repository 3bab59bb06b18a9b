"""`jaxllm generate`: what it asks the engine, and what it prints where."""

import io
import json
from pathlib import Path

import pytest

from jaxllm.cli.main import main


def test_one_text_is_streamed_to_stdout_and_figures_to_stderr(
    engine: type, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "m", "two words", "--page-size", "8", "--no-progress", "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == "TWO WORDS\n"
    assert err == (
        "time to first token 250 ms · 8.0 tokens/s · 5 prompt and 9 output tokens · 3 of 100 KV pages used\n"
    )
    made = engine.made
    assert (made.model, made.options) == ("m", {"page_size": 8, "progress": False, "max_num_seqs": 1})
    (prompt, params) = made.requests[0]
    assert (prompt, params.max_tokens) == ("two words", 4)
    assert made.closed


def test_what_is_not_given_is_the_models_default(engine: type):
    main(["generate", "m", "hi", "--temperature", "0.9"])
    params = engine.made.requests[0][1]
    assert (params.temperature, params.top_k, params.max_tokens) == (0.9, 7, 16)


def test_a_chat_is_messages_of_any_length(engine: type, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "m", "hello", "--chat", "--system", "be brief"]) == 0
    messages, params = engine.made.requests[0]
    assert messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert params.max_tokens is None
    assert capsys.readouterr().out == "HELLO\n"


def test_without_a_prompt_it_reads_stdin(engine: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert main(["generate", "m"]) == 0
    assert engine.made.requests[0][0] == "from a pipe\n"


def test_flags_may_stand_between_prompts(engine: type):
    main(["generate", "m", "--chat", "a", "--n", "2", "b"])
    assert [messages[0]["content"] for messages, _ in engine.made.requests] == ["a", "b"]


def test_several_texts_have_titles(engine: type, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "m", "first", "second\nline", "--n", "2"]) == 0
    assert capsys.readouterr().out == (
        "==> first (1 of 2) <==\nFIRST\n\n==> first (2 of 2) <==\nFIRST\n\n"
        "==> second line (1 of 2) <==\nSECOND\nLINE\n\n==> second line (2 of 2) <==\nSECOND\nLINE\n\n"
    )


def test_a_batch_gets_the_rows_it_has_by_default(engine: type):
    main(["generate", "m", "a", "b"])
    assert "max_num_seqs" not in engine.made.options
    main(["generate", "m", "a", "--n", "2"])
    assert "max_num_seqs" not in engine.made.options
    main(["generate", "m", "a", "--max-num-seqs", "3"])
    assert engine.made.options["max_num_seqs"] == 3


@pytest.mark.parametrize("chat", [False, True])
def test_json_is_an_object_a_line(chat: bool, engine: type, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "m", "a", "b", "--json", "--logprobs", "2"] + ["--chat"] * chat) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["outputs"][0]["text"], second["outputs"][0]["text"]) == ("A", "B")
    assert first["metrics"] == {"time_to_first_token": 0.25, "end_to_end_time": 1.5, "num_preemptions": 0}
    assert engine.made.requests[1][1].logprobs == 2


def test_lists_and_tables_reach_the_engine(engine: type):
    main(
        [
            "generate",
            "m",
            "hi",
            "--stop",
            "a",
            "--stop",
            "b",
            "--stop-token-ids",
            "3",
            "--logit-bias",
            '{"5": -1}',
        ]
    )
    params = engine.made.requests[0][1]
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b"), (3,), {5: -1.0})


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--regex", "[0-9]+"], "regex", "[0-9]+"),
        (["--choice", "yes", "--choice", "no"], "choice", ("yes", "no")),
        (["--json-object"], "json_object", True),
        (["--json-schema", '{"type": "null"}'], "json", '{"type": "null"}'),
        (["--json-schema", "schema.json"], "json", '{"enum": ["é"]}'),
        (["--grammar-file", "grammar.lark"], "grammar", 'start: "a"'),
        (["--structural-tag", '{"format": {}}'], "structural_tag", '{"format": {}}'),
    ],
)
def test_what_the_output_must_be(
    engine: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], field: str, value: object
):
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text('{"enum": ["é"]}', encoding="utf-8")
    Path("grammar.lark").write_text('start: "a"', encoding="utf-8")
    assert main(["generate", "m", "hi", *flags]) == 0
    structured = engine.made.requests[0][1].structured_outputs
    assert getattr(structured, field) == value


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--regex", "a", "--choice", "b"], "give exactly one of json, regex"),
        (["--json-schema", "missing.json"], "missing.json"),
        (["--json-schema", "{"], "json: not JSON"),
    ],
)
def test_bad_constraints_are_errors_of_usage(
    engine: type, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
):
    with pytest.raises(SystemExit):
        main(["generate", "m", "hi", *flags])
    assert said in capsys.readouterr().err
