"""The GGUF container: what is read, and that nothing in a damaged file is believed."""

import struct
from pathlib import Path

import gguf
import gguf_made
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from converters import gguf_file
from converters.checkpoint import open_checkpoint
from converters.errors import CheckpointError
from converters.gguf_file import GGUFFile
from converters.gguf_tokenizer import build_tokenizer

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS = 24, 512


def one_tensor(path: Path, kind: Kind) -> tuple[Path, np.ndarray]:
    """A file with one matrix, and its blocks; those of K-quants are random bytes with sane scales."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ROWS, COLUMNS), np.float32)
    try:
        blocks = gguf.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (ROWS * COLUMNS // block, size), np.uint8)
        halves = raw.view(np.float16)
        halves[~np.isfinite(halves) | (abs(halves) > 8)] = 0.5
        blocks = raw.reshape(ROWS, -1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("m.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, blocks


@pytest.mark.parametrize("kind", sorted(gguf_file.READABLE), ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_package_reads_it(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 5 * 256)  # no divisor of the number of blocks
    path, blocks = one_tensor(tmp_path / "m.gguf", kind)
    expected = gguf.dequantize(blocks, kind).reshape(ROWS, COLUMNS)
    file = GGUFFile(path)
    assert file.tensors["m.weight"].shape == (ROWS, COLUMNS)
    np.testing.assert_array_equal(file.read("m.weight", F32), expected)
    np.testing.assert_array_equal(file.read("m.weight", BF16), expected.astype(BF16))


def test_quantized_values_are_close_to_what_was_stored(tmp_path: Path):
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
    path, _ = one_tensor(tmp_path / "m.gguf", Kind.Q8_0)
    assert abs(GGUFFile(path).read("m.weight", F32) - values).max() < 0.02


def test_a_float_tensor_is_a_view_of_the_file(tmp_path: Path):
    path, _ = one_tensor(tmp_path / "m.gguf", Kind.F32)
    file = GGUFFile(path)
    view = file.read("m.weight", F32)
    assert not view.flags.owndata
    assert not view.flags.writeable
    before = view.copy()
    file.release("m.weight")
    np.testing.assert_array_equal(view, before)


def test_metadata_of_every_type(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("a", 255)
    writer.add_int8("b", -1)
    writer.add_uint16("c", 65535)
    writer.add_int16("d", -2)
    writer.add_int32("e", -3)
    writer.add_float32("f", 0.5)
    writer.add_bool("g", True)
    writer.add_string("h", "naïve ▁")
    writer.add_uint64("i", 2**63)
    writer.add_int64("j", -(2**40))
    writer.add_float64("k", 1e300)
    writer.add_array("l", ["x", "", "yz"])
    writer.add_array("m", [1.5, 2.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert [metadata[key] for key in "abcdefghijkl"] == [
        *(255, -1, 65535, -2, -3, 0.5, True, "naïve ▁", 2**63, -(2**40), 1e300),
        ["x", "", "yz"],
    ]
    assert metadata["m"] == [1.5, 2.5]


class Raw:
    """A GGUF file by hand, so that it can lie."""

    def __init__(self, *, version: int = 3, tensors: int = 0, keys: int = 0) -> None:
        self.data = b"GGUF" + struct.pack("<IQQ", version, tensors, keys)

    def key(self, name: str, kind: int, value: bytes) -> "Raw":
        self.data += self.text(name) + struct.pack("<I", kind) + value
        return self

    def tensor(self, name: str, dims: list[int], kind: int, offset: int) -> "Raw":
        self.data += self.text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        return self

    def write(self, path: Path, payload: int = 0) -> Path:
        padding = -len(self.data) % 32
        path.write_bytes(self.data + bytes(padding + payload))
        return path

    @staticmethod
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()


HUGE = 2**62
LIES = {
    "dimensions that overflow": (Raw(tensors=1).tensor("t", [HUGE, HUGE], 0, 0), "'t' ends at byte"),
    "too many dimensions": (Raw(tensors=1).tensor("t", [1] * 5, 0, 0), "'t' .* claims 5 dimensions"),
    "no dimensions": (Raw(tensors=1).tensor("t", [], 0, 0), "'t' .* claims 0 dimensions"),
    "an empty dimension": (Raw(tensors=1).tensor("t", [4, 0], 0, 0), "'t' .* empty dimension"),
    "an offset past the end": (Raw(tensors=1).tensor("t", [8], 0, HUGE), "'t' ends at byte"),
    "an unaligned offset": (Raw(tensors=1).tensor("t", [8], 0, 4), "'t' begins at offset 4"),
    "a type that is not known": (Raw(tensors=1).tensor("t", [8], 999, 0), "'t' .* unknown type 999"),
    "a type that is not read": (Raw(tensors=1).tensor("t", [256], 16, 0), "'t' is stored as IQ2_XXS"),
    "rows that are no whole blocks": (Raw(tensors=1).tensor("t", [33], 8, 0), "'t' has rows of 33"),
    "the same name twice": (
        Raw(tensors=2).tensor("t", [8], 0, 0).tensor("t", [8], 0, 32),
        "'t' is there twice",
    ),
    "tensors that overlap": (
        Raw(tensors=2).tensor("t", [9], 0, 0).tensor("u", [8], 0, 32),
        "'t' and 'u' overlap",
    ),
    "more tensors than fit": (Raw(tensors=HUGE), "claims 4,611,686"),
    "more keys than fit": (Raw(keys=HUGE), "claims 4,611,686"),
    "a string past the end": (
        Raw(keys=1).key("k", 8, struct.pack("<Q", HUGE)),
        "metadata 'k' .* past the end",
    ),
    "an array past the end": (Raw(keys=1).key("k", 9, struct.pack("<IQ", 4, HUGE)), "metadata 'k' .* claims"),
    "arrays in arrays in arrays": (
        Raw(keys=1).key("k", 9, struct.pack("<IQ", 9, 1) * 8 + struct.pack("<IQ", 4, 0)),
        "metadata 'k' .* nests",
    ),
    "text that is not": (Raw(keys=1).key("k", 8, struct.pack("<Q", 1) + b"\xff"), "metadata 'k' .* UTF-8"),
    "a key twice": (Raw(keys=2).key("k", 4, bytes(4)).key("k", 4, bytes(4)), "metadata 'k' .* twice"),
    "a type of value not known": (Raw(keys=1).key("k", 77, b""), "metadata 'k' .* unknown type 77"),
    "an alignment of three": (
        Raw(keys=1).key("general.alignment", 4, struct.pack("<I", 3)),
        "general.alignment=3",
    ),
    "an alignment of zero": (Raw(keys=1).key("general.alignment", 4, bytes(4)), "general.alignment=0"),
    "version 1": (Raw(version=1), "version 1 is not read .convert"),
    "big-endian": (Raw(version=3 << 24), "version 50331648 is not read .it is big-endian"),
}


@pytest.mark.parametrize(("raw", "message"), LIES.values(), ids=LIES)
def test_a_lie_is_an_error_that_names_what_lies(raw: Raw, message: str, tmp_path: Path):
    path = raw.write(tmp_path / "m.gguf", payload=128)
    with pytest.raises(CheckpointError, match=message) as raised:
        GGUFFile(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"PK\x03\x04" + bytes(100)])
def test_not_a_gguf_file(content: bytes, tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        GGUFFile(path)


def test_a_file_cut_off_names_the_tensor(tmp_path: Path):
    path = gguf_made.write_llama(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.1\..*' ends at byte .* cut off"):
        open_checkpoint(str(path))


TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "▁ab"]
TOKENIZER = {
    "ggml.model": "llama",
    "ggml.tokens": TOKENS,
    "ggml.scores": [0.0] * 3 + [-float(i) for i in range(5)],
    "ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    "ggml.bos_token_id": 1,
    "ggml.eos_token_id": 2,
    "ggml.unknown_token_id": 0,
    "chat_template": "{{ messages }}",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gguf_made.write_llama(path, kind=Kind.Q8_0, tokenizer=TOKENIZER)
    return path.read_bytes()


def everything(path: Path) -> dict[str, np.ndarray]:
    """All that can be read of a file."""
    checkpoint = open_checkpoint(str(path))
    build_tokenizer(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def read_or_refuse(path: Path, content: bytes) -> dict[str, np.ndarray] | None:
    path.write_bytes(content)
    try:
        return everything(path)
    except CheckpointError:
        return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.gguf"


@given(data=st.data())
def test_a_truncated_file_is_refused(data: st.DataObject, good: bytes, scratch: Path):
    length = data.draw(st.integers(0, len(good) - 1))
    assert read_or_refuse(scratch, good[:length]) is None


@given(data=st.data())
def test_flipped_bytes_are_read_or_refused(data: st.DataObject, good: bytes, scratch: Path):
    """Never another exception, and never more or larger tensors than the file has bytes for."""
    header = good.index(b"blk.1.ffn_up.weight") + 64  # where lies can be told; the rest are weights
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    tensors = read_or_refuse(scratch, bytes(damaged))
    if tensors is not None:
        assert sum(values.size for values in tensors.values()) <= len(good)
