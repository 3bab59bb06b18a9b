"""`jaxllm convert`, up to the library that it calls."""

from pathlib import Path

import pytest

import converters.checkpoint
import converters.tokenizer
import jaxllm.models.converting
from jaxllm.cli.main import main


class FakeCheckpoint:
    path = Path("where/it/lies")
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """What the command asked the library for: function name -> (arguments, keywords)."""
    seen: dict[str, tuple] = {}
    checkpoint = FakeCheckpoint()

    def record(name: str, result):
        def call(*args, **kwargs):
            seen[name] = (args, kwargs)
            return result(*args) if callable(result) else result

        return call

    def write(checkpoint: FakeCheckpoint, destination: Path) -> Path:
        assert not checkpoint.closed
        destination.mkdir()
        (destination / "weights").write_bytes(bytes(3_000_000))
        return destination

    monkeypatch.setattr(converters.checkpoint, "open_checkpoint", record("open", checkpoint))
    monkeypatch.setattr(converters.tokenizer, "load_tokenizer", record("tokenizer", "the tokenizer"))
    monkeypatch.setattr(jaxllm.models.converting, "convert", record("convert", write))
    return seen


def test_the_folder_goes_to_stdout_and_its_size_to_stderr(
    calls: dict[str, tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "out"
    assert (
        main(["convert", "some/repo", str(folder), "--revision", "v2", "--no-progress", "--dtype", "float32"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    assert "3 MB" in err
    reading = {"revision": "v2", "cache_dir": None, "token": None}
    assert calls["open"] == (("some/repo",), reading)
    assert calls["tokenizer"] == ((FakeCheckpoint.path,), {**reading, "trust_remote_code": False})
    (checkpoint, destination), options = calls["convert"]
    assert checkpoint.closed
    assert destination == folder
    assert options == {"tokenizer": "the tokenizer", "dtype": "float32", "progress": False}


def test_without_a_tokenizer(calls: dict[str, tuple], tmp_path: Path):
    assert main(["convert", "m", str(tmp_path / "out"), "--skip-tokenizer-init"]) == 0
    assert "tokenizer" not in calls
    assert calls["convert"][1] == {"tokenizer": None, "dtype": None, "progress": True}


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxllm convert: ")
    assert err.count("\n") == 1
