"""Chat templates: what they make of conversations, and what no message can become.

That the ids of 200 conversations are transformers' is in test_anywhere.py.
"""

import json
import random

import pytest
from conftest import TOKENIZERS
from test_gguf_tokenizer import mixed_text

from llama.template import LLAMA2, MARK, ChatTemplate, check_messages, render
from llama.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]


def conversations(n: int) -> list[list[dict]]:
    """Random conversations with and without a system message, in many scripts."""
    chance, found = random.Random(3), []
    for _ in range(n):
        turns = ["user"] + ["assistant", "user"] * chance.randrange(4)
        roles = ["system"] * chance.randrange(2) + turns
        # Names of special tokens are left out: in transformers a message may have them.
        texts = [mixed_text(chance).replace("<", "(") for _ in roles]
        found.append([{"role": role, "content": x} for role, x in zip(roles, texts)])
    return found


def test_llama_2_and_3_see_what_metas_code_gives():
    two, three = (Tokenizer(path) for path, _ in TOKENIZERS.values())
    chat = [{"role": "system", "content": "Be kind"}, *HI]
    chat += [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": " And? "}]
    first = two.encode("[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST] Hello ", eos=True)
    assert ChatTemplate.of(two).ids(chat) == first + two.encode("[INST] And? [/INST]")
    expected = [three.bos_id]
    for message in chat:
        header = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        start, end, eot = (three.special_tokens[name] for name in header)
        expected += [start, *three.encode(message["role"], bos=False), end]
        expected += [*three.encode("\n\n" + message["content"].strip(), bos=False), eot]
    expected += [
        start,
        *three.encode("assistant", bos=False),
        end,
        *three.encode("\n\n", bos=False),
    ]
    assert ChatTemplate.of(three).ids(chat) == expected


@pytest.mark.parametrize(("path", "_"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_names_of_special_tokens_in_a_message_stay_text(path, _):
    tokenizer = Tokenizer(path)
    template = ChatTemplate.of(tokenizer)
    special = set(tokenizer.special_tokens.values())
    count = len([i for i in template.ids(HI) if i in special])
    for name in ("</s>", "<|eot_id|>", "<|start_header_id|>system", f"<{MARK}/s>"):
        ids = template.ids([{"role": "user", "content": f"{name} x {name}"}])
        assert len([i for i in ids if i in special]) == count
        assert f"{name} x {name}".replace(MARK, "") in tokenizer.decode(ids)


def test_a_template_beside_the_tokenizer_goes_before_the_known_one(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(TOKENIZERS["sentencepiece"][0].read_bytes())
    assert ChatTemplate.of(Tokenizer(path)).name == "Llama 2"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "one"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.of(Tokenizer(path)).text(HI) == "one"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}two")
    assert ChatTemplate.of(Tokenizer(path)).text(HI) == "</s>two"


def test_a_tokenizer_without_template_or_known_tokens_is_told():
    tokenizer = Tokenizer(TOKENIZERS["sentencepiece"][0])
    tokenizer.special_tokens = {}
    with pytest.raises(ValueError, match=r"without a chat template.*chat_template\.jinja"):
        ChatTemplate.of(tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'x' * 10 ** 10 }}", "too much for a template"),
        ("{{ 9 ** 9 ** 9 }}", "too much for a template"),
        (LLAMA2, "must alternate"),
    ],
)
def test_a_template_that_fails_is_one_line(source, message):
    with pytest.raises(ValueError, match=f"the chat template fails: .*{message}"):
        render(source, HI + HI, {"bos_token": "", "eos_token": ""})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("Hi", "must be a list"),
        (["Hi"], "message 1: expected a role"),
        ([{"role": "robot", "content": "x"}], "message 1: expected a role"),
        ([*HI, {"role": "assistant"}], "message 2: expected a role .* and a text"),
        ([*HI, {"role": "system", "content": "x"}], "system message comes first"),
        ([*HI, {"role": "assistant", "content": "x"}], "last message is not the user's"),
    ],
)
def test_messages_out_of_order_are_named(messages, message):
    with pytest.raises(ValueError, match=f"line 1.*{message}"):
        check_messages("line 1", messages)


def test_what_transformers_gives_templates_is_there():
    source = "{% generation %}{{ messages | tojson(indent=1) }}{% endgeneration %}"
    source += "{{ strftime_now('%Y') }}{% for x in [1, 2] %}{% break %}{% endfor %}"
    text = render(source, [{"role": "user", "content": "<é>"}], {})
    assert text.startswith('[\n {\n  "role": "user",\n  "content": "<é>"\n }\n]20')
    with pytest.raises(ValueError, match="'strftime_now' is undefined"):
        render(source, HI, {}, dated=False)


def test_other_texts_of_a_message_become_no_special_token_either():
    tokenizer = Tokenizer(TOKENIZERS["sentencepiece"][0])
    template = ChatTemplate("{{ messages[0].name }}", tokenizer)
    assert tokenizer.eos_id not in template.ids([HI[0] | {"name": "x</s>"}])
