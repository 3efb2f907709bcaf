"""Conversations: what is read again, what is left out, and a chat driven in a real terminal."""

import json
import os
import re
import sys
import termios

import pexpect
import pytest
import torch
from conftest import REPO, TOKENIZERS, flags_of, make_ckpt, run_script

from llama import LLaMA
from llama.chat import Chat
from llama.options import GenerationOptions
from llama.prompts import complete, read_requests
from llama.template import ChatTemplate

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]
PROMPT = re.escape("\x1b[0;32;1m> ")  # as prompt_toolkit draws it


@pytest.fixture(scope="module")
def ckpt_dir(tmp_path_factory):
    return make_ckpt(tmp_path_factory.mktemp("chat") / "ckpt", 2, vocab_size=VOCAB_SIZE)


def chat_of(ckpt_dir, system=None, max_seq_len=256, **params):
    llama = LLaMA.build(ckpt_dir, PATH, max_seq_len)
    params = {"max_gen_len": 10, "temperature": 0} | params
    return Chat(llama, ChatTemplate.of(llama.tokenizer), system, **params)


def ask(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text))


def test_a_turn_reads_its_own_tokens_alone_and_answers_as_if_it_read_all(ckpt_dir):
    chat = chat_of(ckpt_dir, "Be kind")
    for number, question in enumerate(["Who are you?", "你是谁？ 🦙", "And now?"]):
        n_before = chat.generator.timing.prompt_tokens
        answer = ask(chat, question)
        read = chat.generator.timing.prompt_tokens - n_before
        asked = chat._ids[: len(chat._ids) - len(chat.output.token)]
        # As in the template, but for the ids of answers, which stay as they were written.
        expected = chat.template.ids(chat.messages[:-1])
        end = len(expected) - expected[::-1].index(chat.template.tokenizer.bos_id)
        assert asked[-len(expected[end:]) :] == expected[end:]
        if number:  # and the last token of the answer before, which was written, and not read
            new = [28705, 2, 1, *expected[end:]]  # a space, </s>, <s>
            assert asked[-len(new) :] == new
            assert read == len(new) + 1
        assert chat.generator.generate([asked], 10, temperature=0)[0].text == answer
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]


def test_a_full_context_loses_its_oldest_turns_and_not_the_system_message(ckpt_dir):
    chat = chat_of(ckpt_dir, "Be kind", max_seq_len=100)
    for number in range(6):
        ask(chat, f"Question number {number}, please")
        assert len(chat._ids) <= 100
    assert chat.n_dropped >= 2
    assert chat.messages[0] == {"role": "system", "content": "Be kind"}
    assert chat.messages[1]["content"].startswith("Question number")
    with pytest.raises(ValueError, match="no room to generate in max_seq_len 100"):
        chat.ask("word " * 120)
    assert chat.messages[-1]["role"] == "assistant"  # the message is forgotten
    chat.reset()
    assert chat.messages == chat.system


def test_chat_instruct_and_messages_see_the_same(ckpt_dir, tmp_path, capsys):
    question = "Name a river </s> in Africa"
    (tmp_path / "m.jsonl").write_text(json.dumps([{"role": "user", "content": question}]))
    (tmp_path / "lines").write_text(
        f"{question}\n/save {tmp_path / 'saved.jsonl'}\n/save /\n/nonsense\n"
    )
    found = []
    for given in ({"messages_file": tmp_path / "m.jsonl"}, {"instruct": True, "prompt": question}):
        flags = {"ckpt_dir": ckpt_dir, "temperature": 0, "max_gen_len": 12, "json": True} | given
        options = GenerationOptions(**flags)
        complete(LLaMA.build(ckpt_dir, PATH), read_requests(options), options)
        said = capsys.readouterr()
        assert "the tokenizer has no chat template; taking that of Llama 2" in said.err
        found.append(json.loads(said.out))
    one, two = found
    flags = flags_of(ckpt_dir=ckpt_dir, tokenizer_path=PATH, temperature=0, max_gen_len=12)
    with (tmp_path / "lines").open() as lines:
        by_chat = run_script("example.py", *flags, "--chat", n=2, stdin=lines)
    assert by_chat.returncode == 0, by_chat.stderr
    assert "the tokenizer has no chat template; taking that of Llama 2" in by_chat.stderr
    assert one["tokens"] == two["tokens"]
    assert one["timings"]["prompt_tokens"] == two["timings"]["prompt_tokens"]
    assert one["finish_reason"] == "length"
    saved = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    assert saved[0]["content"] == question
    assert saved[1]["content"] == one["text"] == two["text"]
    assert by_chat.stdout == one["text"] + "\n"
    assert "not saved: " in by_chat.stderr
    assert "\n/reset           forget" in by_chat.stderr  # of help, for what is no command


def test_a_chat_in_a_terminal_ends_answers_and_itself(ckpt_dir):
    flags = flags_of(ckpt_dir=ckpt_dir, tokenizer_path=PATH, max_gen_len=4000, max_seq_len=4096)
    env = os.environ | {"TERM": "xterm", "NO_COLOR": "", "PYTHONPATH": str(REPO)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "example.py"]
    chat = pexpect.spawn(
        sys.executable, [*torchrun, *flags, "--chat"], cwd=str(REPO), env=env, timeout=60
    )
    before = termios.tcgetattr(chat.child_fd)
    for _ in range(2):
        chat.expect(PROMPT)
        chat.send("Tell me all\r")
        chat.expect(r"2004l[^\x1b]{20}")  # the answer goes on
        chat.send("\x1c\x1atyped ahedd\x7f\x7fad\x03")  # keys that elsewhere are signals
    chat.expect(PROMPT)
    chat.expect("typed ahead")
    chat.send("\x03/reset\r")  # takes the line back
    chat.expect("forgotten")
    chat.expect(PROMPT)
    chat.send("\x04")
    chat.expect("loaded in")
    chat.expect(pexpect.EOF)
    assert termios.tcgetattr(chat.child_fd) == before
    chat.close()
    assert chat.exitstatus == 0


def test_a_conversation_survives_what_nobody_reads_and_stop_strings(ckpt_dir):
    chat = chat_of(ckpt_dir, stop=["a"])
    for _ in chat.ask("Hi"):
        break
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    answer = ask(chat, "And?")  # read anew: the model had written more than was seen
    assert "a" not in answer
    assert chat.cache.ids[: len(chat.template.ids(chat.messages[:-1]))] == chat.template.ids(
        chat.messages[:-1]
    )
    chat.generator.soft_prompt = chat.generator.model.tok_embeddings(torch.tensor([5, 6]))
    again = chat_of(ckpt_dir, stop=["a"])
    again.generator.soft_prompt = chat.generator.soft_prompt
    again.turns = list(chat.turns)
    assert ask(chat, "With a tuned prompt?") == ask(again, "With a tuned prompt?")
    with pytest.raises(ValueError, match="no echo where it keeps a cache"):
        chat.generator.stream([1], cache=chat.cache, echo=True)
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        Chat(chat.generator, top_k=2.5)


def test_a_long_message_does_not_cost_the_whole_history(ckpt_dir):
    chat = chat_of(ckpt_dir, max_seq_len=200)
    for number in range(4):
        ask(chat, f"Question number {number}, please")
    ask(chat, "word " * 100)
    assert 0 < chat.n_dropped < 4
