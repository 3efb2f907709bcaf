"""Text that comes in pieces: whole characters, whole at the end, cut at stop strings."""

import random

import pytest
from conftest import TOKENIZERS
from test_gguf_tokenizer import SMOLLM2, mixed_text, tokenizer_in

from llama.text_stream import TextStream
from llama.tokenizer import Tokenizer


@pytest.fixture(params=[*TOKENIZERS, "json"], scope="module")
def tokenizer(request, tmp_path_factory):
    if request.param == "json":
        from test_gguf_tokenizer import meta_of

        return tokenizer_in(tmp_path_factory.mktemp("json"), meta_of(SMOLLM2))
    return Tokenizer(TOKENIZERS[request.param][0])


def pieces_of(tokenizer, prompt: str, text: str, stop=()) -> tuple[list[str], TextStream]:
    """The pieces of a text's tokens behind a prompt's, up to a stop string."""
    before = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + text)
    ids = ids[len(before) :] if ids[: len(before)] == before else tokenizer.encode(text, bos=False)
    stream, pieces = TextStream(tokenizer, before, stop), []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def test_pieces_of_whole_characters_join_to_the_text(tokenizer):
    chance = random.Random(1)
    for _ in range(200):
        prompt, text = mixed_text(chance), mixed_text(chance).replace("\ufffd", "")
        ids = tokenizer.encode(prompt), tokenizer.encode(text, bos=False)
        pieces, _ = pieces_of(tokenizer, prompt, text)
        whole = tokenizer.decode(tokenizer.encode(prompt + text))
        if tokenizer.encode(prompt + text)[: len(ids[0])] == ids[0]:
            assert tokenizer.decode(ids[0]) + "".join(pieces) == whole
        else:  # the two merge where they meet
            assert "".join(pieces).strip() == tokenizer.decode(ids[1]).strip()
        assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in whole


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    ids = tokenizer.encode("🦙", bos=False)
    half = ids[:-1]  # llamas are no token of their own in any of the three
    stream = TextStream(tokenizer, tokenizer.encode("A"))
    shown = [stream.add(token) for token in half]
    assert "".join(shown).strip() == ""
    assert set(stream.finish().strip()) == {"\ufffd"}


def test_stop_strings_are_cut_exactly_also_across_tokens(tokenizer):
    text = " one two three, four five six seven 你好世界 eight"
    for stop in ("three", "o thr", "r five six se", "世", "好世界 e", ",", "eight"):
        pieces, stream = pieces_of(tokenizer, "Count", text, ["no such text", stop])
        assert stream.stopped
        assert "".join(pieces) == text[: text.index(stop)], stop
    for stop in ("sevem", "eighteen", "threee"):  # begin like the text, and never come
        pieces, stream = pieces_of(tokenizer, "Count", text, [stop])
        assert not stream.stopped
        assert "".join(pieces) == text
    pieces, _ = pieces_of(tokenizer, "Count", text, ["four", "three, four"])
    assert "".join(pieces) == " one two "  # the first to begin
