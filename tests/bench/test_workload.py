"""The workload's ids, which must never change, and files of requests."""

import hashlib
import json
from pathlib import Path

import pytest

from jaxllm.bench import workload
from jaxllm.bench.workload import Item


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_the_fixed_workload_is_that_of_the_peers() -> None:
    assert workload.single()[:4] == [48713, 23596, 45349, 48589]
    assert (
        digest([workload.batch(), workload.single(), workload.long(), workload.shared_prefix()])
        == "838ece48b21fd7fe"
    )
    assert [len(workload.single()), len(workload.long()), len(workload.batch())] == [128, 1024, 32]


def test_more_requests_begin_with_the_same() -> None:
    assert workload.batch(count=40)[:32] == workload.batch()


def test_a_small_vocabulary_is_kept_to() -> None:
    ids = [token for prompt in workload.batch(125) for token in prompt]
    assert (min(ids), max(ids)) == (62, 124)


def test_arrivals_come_at_the_rate_and_stay_the_same() -> None:
    items = workload.with_arrivals([Item([1], 1)] * 1000, 50.0)
    due = [item.due for item in items]
    assert due == sorted(due)
    assert due[-1] == pytest.approx(1000 / 50, rel=0.1)
    assert due == [item.due for item in workload.with_arrivals([Item([1], 1)] * 1000, 50.0)]


def test_a_dataset(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    lines = [{"prompt": "a"}, {"prompt_token_ids": [1, 2], "output_len": 3}, {"messages": chat}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    items = workload.read_dataset(file, output_len=7)
    assert items == [Item("a", 7), Item([1, 2], 3), Item(chat, 7)]
    assert [item.is_chat for item in items] == [False, False, True]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Expecting"),
        ("[1]", "must be a JSON object"),
        ("{}", "exactly one of"),
        ('{"prompt": "a", "messages": []}', "exactly one of"),
        ('{"prompt": "a", "max_tokens": 3}', "unknown keys max_tokens"),
        ('{"prompt": ""}', "prompt: must be a string"),
        ('{"prompt": ["a"]}', "prompt: must be a string"),
        ('{"prompt_token_ids": [1, true]}', "must be token ids"),
        ('{"prompt_token_ids": 7}', "must be token ids"),
        ('{"messages": ["a"]}', "must be messages"),
        ('{"prompt": "a", "output_len": 0}', "output_len=0"),
        ('{"prompt": "a", "output_len": true}', "output_len=True"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=complaint) as found:
        workload.read_dataset(file)
    assert str(found.value).startswith(f"{file}:2: ")


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no requests"):
        workload.read_dataset(tmp_path / "empty.jsonl")
