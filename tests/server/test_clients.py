"""The commands that talk to a server: complete, chat, run-batch, bench serve."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from running import Running

from jaxllm.cli.main import main

GREEDY = ["--temperature", "0", "--max-tokens", "8"]
ENGINE = [
    "--dtype", "float32", "--page-size", "4", "--num-pages", "200", "--max-num-seqs", "6",
    "--max-num-batched-tokens", "32", "--no-compilation-cache",
]  # fmt: skip

REFUSED = "cannot reach http://127.0.0.1:9: connection refused; is the server running?"
"""What is said of a server that is not there."""


def expected(server: Running, **body: Any) -> str:
    body = {"temperature": 0, "max_tokens": 8} | body
    if "messages" in body:
        choice = server.post("/v1/chat/completions", **body).json()["choices"][0]
        return choice["message"]["content"]
    return server.post("/v1/completions", **body).json()["choices"][0]["text"]


def test_complete(
    server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = expected(server, prompt="abc")
    assert main(["complete", "abc", "--url", server.url, *GREEDY]) == 0
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert main(["complete", "--echo", "--url", f"{server.url}/v1", "--model-name", "small", *GREEDY]) == 0
    assert capsys.readouterr().out == f"abc{text}\n"
    assert main(["complete", "a" * 500, "--url", server.url]) == 1
    assert "max_model_len" in capsys.readouterr().err
    assert main(["complete", "a", "--url", "http://127.0.0.1:9", *GREEDY]) == 1
    assert REFUSED in capsys.readouterr().err


def test_chat(server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = [{"role": "user", "content": "hi"}]
    one = expected(server, messages=first)
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "yo"}]
    two = expected(server, messages=second)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nyo\n"))
    assert main(["chat", "--url", server.url, "--json", *GREEDY]) == 0
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["content"] for answer in answers] == [one, two]
    assert {answer["finish_reason"] for answer in answers} == {"length"}
    assert "tiny" in err
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert REFUSED in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["chat"],
        ["chat", "m", "--url", "http://x"],
        ["chat", "--url", "http://x", "--dtype", "float32"],
        ["chat", "--url", "http://x", "--figures"],
        ["run-batch", "-i", "x", "-o", "y"],
        ["run-batch", "--url", "http://x", "--num-pages", "3", "-i", "x", "-o", "y"],
        ["run-batch", "--url", "127.0.0.1:8000", "-i", "x", "-o", "y"],
        ["bench", "serve", "--url", "127.0.0.1:8000"],
    ],
)
def test_errors_of_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "--url" in capsys.readouterr().err


def batch_line(custom_id: str, **body: Any) -> str:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    body = {"max_tokens": 8, "temperature": 0} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def answers(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def test_a_batch_goes_on_where_it_ended(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["a", "b", "c", "d", "e"]
    messages = [{"role": "user", "content": "hi"}]
    source.write_text(
        "".join(batch_line(p, prompt=p) for p in prompts) + batch_line("chat", messages=messages)
    )
    argv = ["run-batch", "--url", server.url, "-i", str(source), "-o", str(target)]
    assert main(argv) == 0
    found = answers(target)
    bodies = {name: line["response"]["body"] for name, line in found.items()}
    assert {p: bodies[p]["choices"][0]["text"] for p in prompts} == {
        p: expected(server, prompt=p) for p in prompts
    }
    assert bodies["chat"]["choices"][0]["message"]["content"] == expected(server, messages=messages)
    assert {line["response"]["status_code"] for line in found.values()} == {200}
    assert {line["error"] for line in found.values()} == {None}

    kept = target.read_text().splitlines(keepends=True)
    target.write_text("".join(kept[:3]) + kept[3][:20])  # as after a crash
    served = server.figures()["requests_total"]
    assert main(argv) == 0
    assert server.figures()["requests_total"] == served + 3
    assert set(answers(target)) == {*prompts, "chat"}
    assert target.read_text().startswith("".join(kept[:3]))
    assert main(argv) == 0
    assert server.figures()["requests_total"] == served + 3
    assert "6 requests, 6 answered before" in capsys.readouterr().err


def test_a_batch_that_was_not_answered_is_sent_again(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(batch_line("1", prompt="a") + batch_line("2", prompt="b"))
    monkeypatch.setattr("jaxllm.server.batch.RETRY_SECONDS", 0.0)
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--url"]
    assert main([*argv, "http://127.0.0.1:9"]) == 1
    assert [line["error"] for line in answers(target).values()] == [
        {"code": "connection_error", "message": REFUSED}
    ] * 2
    assert f"2 of 2 requests failed; see {target}\nthe first: {REFUSED}\n" in capsys.readouterr().err
    full = {"status_code": 503, "request_id": "", "body": {}}
    refused = {"id": "x", "custom_id": "2", "response": full, "error": None}
    [one, _] = target.read_text().splitlines()
    target.write_text(f"{one}\n{json.dumps(refused)}\n")
    assert main([*argv, server.url]) == 0
    assert {line["response"]["status_code"] for line in answers(target).values()} == {200}
    assert set(answers(target)) == {"1", "2"}


def test_a_batch_with_errors(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(batch_line("good", prompt="a") + batch_line("bad", prompt="a", temperature=-1))
    argv = ["run-batch", "--url", server.url, "-i", str(source), "-o", str(target)]
    assert main(argv) == 1
    found = answers(target)
    assert found["good"]["response"]["status_code"] == 200
    assert found["bad"]["response"]["status_code"] == 400
    assert found["bad"]["response"]["body"]["error"]["param"] == "temperature"
    for line, complaint in (
        ("x\n", "in.jsonl:1"),
        ("{}\n", "custom_id"),
        (batch_line("a", prompt="a") * 2, "in.jsonl:2"),
        (batch_line("a", prompt="a", stream=True), "stream"),
    ):
        source.write_text(line)
        assert main(argv) == 1
        assert complaint in capsys.readouterr().err


def test_a_batch_with_an_engine_of_its_own(
    server: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(batch_line("1", prompt="abc") + batch_line("2", prompt="xyz"))
    assert main(["run-batch", str(model), "-i", str(source), "-o", str(target), *ENGINE]) == 0
    found = answers(target)
    texts = [found[name]["response"]["body"]["choices"][0]["text"] for name in ("1", "2")]
    assert texts == [expected(server, prompt=prompt) for prompt in ("abc", "xyz")]
    source.write_text(
        batch_line("3", prompt="abc", model="other") + batch_line("4", prompt="abc", model=str(model))
    )
    assert main(["run-batch", str(model), "-i", str(source), "-o", str(target), *ENGINE]) == 1
    said = f"the first: 404: model: 'other' is not served here; give {str(model)!r}, or leave it out\n"
    assert said in capsys.readouterr().err
    assert main(["run-batch", str(tmp_path), "-i", str(source), "-o", str(tmp_path / "o"), *ENGINE]) == 1


def test_bench_serve(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "loads.png"
    argv = ["bench", "serve", "--url", server.url, "--vocab-size", "125", "--num-prompts", "6"]
    argv += ["--input-len", "12", "--output-len", "10", "--max-concurrency", "2", "6"]
    assert main([*argv, "--request-rate", "200", "--json", "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["benchmark"], report["model"]) == ("serve", "tiny")
    for load in ("200/s, 2 clients", "200/s, 6 clients"):
        found = report[load]
        assert (found["requests"], found["failed"]) == (6, 0)
        assert (found["prompt_tokens"], found["output_tokens"]) == (72, 60)
        assert found["output_tokens_per_second"] == pytest.approx(60 / found["seconds"])
        for name in ("ttft_seconds", "tpot_seconds", "itl_seconds", "e2e_seconds"):
            assert 0 < found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]
        assert found["e2e_seconds"]["p50"] > found["ttft_seconds"]["p50"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*argv[:5], "900", "--num-prompts", "2"]) == 1  # ids that the model does not know
    said = capsys.readouterr().err
    assert "every request failed: 400: " in said
    assert '{"' not in said
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert REFUSED in capsys.readouterr().err
    assert main([*argv, "--model-name", "other"]) == 1
    assert "tiny, small" in capsys.readouterr().err


def test_bench_serve_has_proxies_from_the_environment_and_no_logins(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login in ~/.netrc takes no key's place."""
    logins = tmp_path / "netrc"
    logins.write_text("default login somebody password none\n")
    monkeypatch.setenv("NETRC", str(logins))
    argv = ["bench", "serve", "--url", server.url, "--api-key", "k", "--vocab-size", "125"]
    argv += ["--num-prompts", "2", "--input-len", "4", "--output-len", "2", "--json"]
    assert main(argv) == 0
    assert '"failed": 0' in capsys.readouterr().out
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, proxy in (("all_proxy", "127.0.0.1:9"), ("http_proxy", "http://127.0.0.1:10")):
        monkeypatch.setenv(name, proxy)
        assert main(argv) == 1
        through = f"{server.url} through the proxy http://{proxy.removeprefix('http://')}: connection refused"
        assert f"cannot reach {through}" in capsys.readouterr().err
