"""What is shown of something that does not tell how far it has come."""

import time

import pytest

from jaxllm.engine.waiting import UNNOTICED, waiting


def test_shows_what_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("Building", progress=True):
        time.sleep(2.5 * UNNOTICED)
    assert "Building: 00:0" in capsys.readouterr().err


@pytest.mark.parametrize(("progress", "seconds"), [(True, 0.0), (False, 1.5 * UNNOTICED)])
def test_shows_nothing_otherwise(progress: bool, seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("Building", progress=progress):
        time.sleep(seconds)
    assert capsys.readouterr().err == ""


def test_the_error_is_the_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no compiler"), waiting("Building", progress=True):
        raise ValueError("no compiler")
