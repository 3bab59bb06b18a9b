"""The server does what its own OpenAPI document says, whatever it is sent (`make fuzz`).

Schemathesis makes requests that keep to the document and others that do not, and holds every answer to it:
no status of 5xx, none that is not in the document, bodies of the form that is in there.
https://schemathesis.readthedocs.io/
"""

import os
import subprocess
from pathlib import Path

import pytest
from running import running

SECONDS = 150
UNTRIED = ("/sleep", "/start_profile")
"""Paths after which others answer 503, or that write to the disk."""
UNCHECKED = "positive_data_acceptance"
"""The document has types, and the model sets limits to values: what keeps to the one may exceed the other."""


@pytest.mark.fuzz
@pytest.mark.timeout(2 * SECONDS + 60)
def test_the_server_keeps_to_its_document(model: Path, tmp_path: Path) -> None:
    program = os.environ["SCHEMATHESIS"]
    with running(model, served_model_name=("tiny",), admin=True, max_body_bytes=100_000) as server:
        done = subprocess.run(
            [
                program, "run", f"{server.url}/openapi.json", f"--max-time={SECONDS}", "--checks=all",
                f"--exclude-checks={UNCHECKED}", *(f"--exclude-path={path}" for path in UNTRIED),
            ],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=2 * SECONDS,
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0
        server.wait_idle()
        assert server.figures()["pages_used"] == 0
        assert server.http.get("/health").is_success
