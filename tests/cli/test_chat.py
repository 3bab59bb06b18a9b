"""`jaxllm chat`: the conversation it keeps, and how it is steered."""

import contextlib
import io
import json
import os
import pty
import signal
from collections.abc import Iterator

import pytest

from jaxllm.cli.chat import Conversation, held_interrupt
from jaxllm.cli.main import main
from jaxllm.cli.speakers import EngineSpeaker
from jaxllm.sampling.params import RequestOutputKind, SamplingParams

DELTA = SamplingParams(output_kind=RequestOutputKind.DELTA)


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["chat", "m", *flags])


def test_answers_go_to_stdout_and_the_conversation_grows(
    engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert chat(monkeypatch, "hello you\n\n  again \n", "--system", "s") == 0
    out, err = capsys.readouterr()
    assert out == "HELLO YOU\nAGAIN\n"
    assert "/exit" in err
    assert engine.made.requests[1][0] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hello you"},
        {"role": "assistant", "content": "HELLO YOU"},
        {"role": "user", "content": "again"},
    ]
    assert engine.made.requests[0][1].max_tokens is None
    assert engine.made.closed


def test_reset_exit_and_unknown_commands(
    engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert chat(monkeypatch, "one\n/reset\ntwo\n/what now\n/exit\nthree\n", "--system", "s") == 0
    assert [len(messages) for messages, _ in engine.made.requests] == [2, 2]
    out, err = capsys.readouterr()
    assert out == "ONE\nTWO\n"
    assert "/what is no command" in err


def test_json_and_figures(engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert chat(monkeypatch, "hi there\n", "--json", "--figures") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"role": "assistant", "content": "HI THERE", "finish_reason": "length"}
    assert "tokens/s" in err


def test_a_refused_message_ends_a_script(
    engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert chat(monkeypatch, "refuse me\nmore\n") == 1
    assert "max_model_len=8" in capsys.readouterr().err


@pytest.fixture
def conversation(engine: type) -> Conversation:
    return Conversation(EngineSpeaker(engine.from_pretrained("m"), DELTA), None)


def test_a_refused_message_leaves_the_conversation(conversation: Conversation):
    with pytest.raises(ValueError, match="max_model_len"):
        conversation.answer("refuse", show=str, stopped=lambda: False)
    assert conversation.messages == []


def test_a_stopped_answer_is_kept_and_its_request_ended(conversation: Conversation):
    shown: list[str] = []
    answer = conversation.answer("a b c d", show=shown.append, stopped=lambda: len(shown) == 2)
    assert answer == {"role": "assistant", "content": "A B ", "finish_reason": "stopped"}
    assert conversation.messages[-1] == {"role": "assistant", "content": "A B "}
    assert conversation.speaker.engine.streams_open == 0  # pyright: ignore[reportAttributeAccessIssue]


def test_an_interrupt_is_held_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with held_interrupt() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal in place of stdin; what is written to the yielded end is typed."""
    typed, seen = pty.openpty()
    with os.fdopen(seen, "r") as stdin, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", stdin)
        patch.setattr("sys.stdout.isatty", lambda: True)
        yield typed
    os.close(typed)


def test_in_a_terminal_an_error_is_shown_and_the_talk_goes_on(
    engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with terminal(monkeypatch) as keyboard:
        os.write(keyboard, b"refuse\nhello\n/exit\n")
        assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out.replace("> ", "") == "HELLO\n"
    assert "max_model_len=8" in err
