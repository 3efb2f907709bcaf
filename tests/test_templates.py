"""Rows as tokens: what is learned of them, in Alpaca's template, in chat templates, in none.

Start reading at HAND, three chat templates and the masks that they must get, made by hand.
"""

import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import TOKENIZERS
from test_gguf_tokenizer import mixed_text
from test_tokenizer import save_json

from llama.template import ChatTemplate
from llama.tokenizer import Tokenizer
from llama.tuning.options import ALPACA_PREAMBLE
from llama.tuning.rows import FORMS
from llama.tuning.templates import (
    ChatEncoder,
    PromptEncoder,
    Tokens,
    alpaca_chat_template,
    alpaca_prompt,
    encoder_for,
)

BEGINNING = "Below is an instruction that describes a task"
ENDING = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
OUTPUTS = ("In short: yes.", "", " spaced", "\nnext line", "1 + 1 = 2", "北京 🦙", ")")


class ByteTokenizer:
    """A token a byte."""

    bos_id = 256
    eos_id = 257
    words = {"bos_token": "<s>"}  # noqa: RUF012

    def encode(self, s, *, bos=True, eos=False):
        return [self.bos_id] * bos + list(s.encode()) + [self.eos_id] * eos


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return Tokenizer(TOKENIZERS[request.param][0])


def alpaca_row(instruction: str, output: str, input: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output}


def encode(row: dict, tokenizer=None, longest: int = 10**6, template: str = "alpaca") -> Tokens:
    return PromptEncoder(tokenizer or ByteTokenizer(), template).encode(row, longest)


def learned(row: Tokens) -> list[int]:
    return [label for label in row.labels if label != -100]


# Alpaca's template


def test_prompts_are_alpacas_to_the_letter():
    assert alpaca_prompt("Do it") == f"{BEGINNING}. {ENDING}Do it\n\n### Response:"
    assert alpaca_prompt("Do it").startswith(f"{ALPACA_PREAMBLE}\n\n### Instruction:")
    assert alpaca_prompt("Do it", "now") == (
        f"{BEGINNING}, paired with an input that provides further context. {ENDING}Do it\n\n"
        "### Input:\nnow\n\n### Response:"
    )


@pytest.mark.parametrize("text", ["{instruction}", "{input}", "{}", "{{x}}", "{0}", "a % b \\1"])
def test_braces_in_a_users_text_survive(text):
    assert f"\n{text}\n" in alpaca_prompt(text)
    assert f"### Instruction:\n{text}\n\n### Input:\n{text}\n" in alpaca_prompt(text, text)


def test_prompt_ids_are_those_that_generation_feeds(tokenizer):
    for output in OUTPUTS:
        for extra in ("", "é 北京 "):
            row = encode(alpaca_row("Say {x}", output, extra), tokenizer)
            prompt = alpaca_prompt("Say {x}", extra)
            prompt_ids = tokenizer.encode(prompt, bos=True)
            assert row.ids[: len(prompt_ids)] == prompt_ids
            response = row.ids[len(prompt_ids) :]
            assert response[-1] == tokenizer.eos_id
            assert row.labels == [-100] * len(prompt_ids) + response
            # No space that SentencePiece makes up stands between the two.
            assert tokenizer.decode(row.ids) == prompt + output


@pytest.mark.parametrize(("kind", "output"), [("sentencepiece", ":-)"), ("tiktoken", "\nnext")])
def test_a_response_that_merges_with_the_prompt_is_encoded_alone(kind, output):
    tokenizer = Tokenizer(TOKENIZERS[kind][0])
    prompt = alpaca_prompt("Say it")
    prompt_ids = tokenizer.encode(prompt, bos=True)
    merged = tokenizer.encode(prompt + output, bos=True)
    assert merged[: len(prompt_ids)] != prompt_ids  # else this test shows nothing
    row = encode(alpaca_row("Say it", output), tokenizer)
    alone = tokenizer.encode(output, bos=False, eos=True)
    assert row.ids == prompt_ids + alone
    assert learned(row) == alone


def test_a_tokenizer_without_bos_serves():
    class NoBos(ByteTokenizer):
        def encode(self, s, *, bos=True, eos=False):
            return super().encode(s, bos=False, eos=eos)

    row = encode(alpaca_row("a", "b"), NoBos())
    assert row.ids == [*(alpaca_prompt("a") + "b").encode(), 257]
    assert learned(row) == [ord("b"), 257]


def test_the_chat_template_of_a_tuned_prompt_gives_what_it_was_trained_on(tokenizer):
    template = ChatTemplate(alpaca_chat_template(tokenizer), tokenizer)
    for instruction in ("Name a river.", " {% raw %}\n\n{{ x }} 你好 ", "### Response:"):
        messages = [{"role": "user", "content": instruction}]
        assert template.ids(messages) == tokenizer.encode(alpaca_prompt(instruction))
    more = [*messages, {"role": "assistant", "content": "One"}, {"role": "user", "content": "Two"}]
    after = tokenizer.decode(template.ids(more)).removeprefix(alpaca_prompt(instruction))
    assert after == "One\n\n### Instruction:\nTwo\n\n### Response:"
    with pytest.raises(ValueError, match="takes no system message"):
        template.ids([{"role": "system", "content": "Be kind"}, *messages])


OTHERS = [  # a row, its template, what is read before what is learned
    (alpaca_row("Add", "3", "1, 2"), "none", b"Add\n\n1, 2", b"3"),
    ({"prompt": "2 + 2 =", "completion": " 4"}, "none", b"2 + 2 =", b" 4"),
    (
        {"prompt": "2 + 2 =", "completion": " 4"},
        "alpaca",
        alpaca_prompt("2 + 2 =").encode(),
        b" 4",
    ),
    ({"text": "All of it"}, "none", b"", b"All of it"),
]


@pytest.mark.parametrize(("row", "template", "read", "answer"), OTHERS)
def test_of_prompts_the_answer_is_learned_and_texts_as_a_whole(row, template, read, answer):
    found = encode(row, template=template)
    assert found.ids == [256, *read, *answer, 257]
    assert learned(found) == [*answer, 257]
    assert found.n_learned == len(answer) + 1


def test_rows_have_their_own_templates():
    conversations, _, instructions, prompts, texts = FORMS
    tokenizer = Tokenizer(TOKENIZERS["tiktoken"][0])
    for form, first in ((instructions, "alpaca"), (prompts, "none"), (texts, "none")):
        name = {"alpaca": "in Alpaca's template", "none": "in no template"}[first]
        assert encoder_for(form, tokenizer, None).name == name
    name = "in the chat template of Llama 3: the tokenizer has none"
    for form, template in ((conversations, None), (instructions, "chat"), (prompts, "chat")):
        assert encoder_for(form, tokenizer, template).name == name
    for form, template in ((conversations, "alpaca"), (conversations, "none"), (texts, "chat")):
        with pytest.raises(ValueError, match=f"--template {template} does not go with {form.name}"):
            encoder_for(form, tokenizer, template)


# Chat templates, and masks by hand

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("\n", "{{ '\\n' }}")
LLAMA2 = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {% if loop.first and messages[0].role == 'system' %}"
    "<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
).replace("\n", "{{ '\\n' }}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "\n\n{{ m.content.strip() }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
).replace("\n", "{{ '\\n' }}")

Pieces = list[tuple[list[int], bool]]  # ids, and whether they are learned


def plain(tokenizer: Tokenizer, text: str, before: str = "") -> list[int]:
    """The ids of a text behind another one, between special tokens."""
    ids, both = (tokenizer.encode(x, bos=False) for x in (before, before + text))
    same = both[: len(ids)] == ids
    return both[len(ids) :] if same else tokenizer.encode(text, bos=False)


def chatml_by_hand(tokenizer: Tokenizer, messages: list[dict]) -> Pieces:
    start, end = (tokenizer.special_tokens[f"<|im_{x}|>"] for x in ("start", "end"))
    newline, pieces = plain(tokenizer, "\n"), []
    for message in messages:
        head = f"{message['role']}\n"
        between = newline if pieces else []
        if message["role"] == "assistant":
            pieces.append(([*between, start, *plain(tokenizer, head)], False))
            pieces.append(([*plain(tokenizer, message["content"], head), end], True))
        else:
            text = plain(tokenizer, head + message["content"])
            pieces.append(([*between, start, *text, end], False))
    return pieces


def llama2_by_hand(tokenizer: Tokenizer, messages: list[dict]) -> Pieces:
    texts, pieces = [message["content"] for message in messages], []
    system = f"<<SYS>>\n{texts.pop(0)}\n<</SYS>>\n\n" if len(texts) % 2 else ""
    for question, answer in zip(texts[::2], texts[1::2]):
        asked = f"[INST] {system}{question} [/INST]"
        pieces.append(([tokenizer.bos_id, *plain(tokenizer, asked)], False))
        pieces.append(([*plain(tokenizer, f" {answer} ", asked), tokenizer.eos_id], True))
        system = ""
    return pieces


def llama3_by_hand(tokenizer: Tokenizer, messages: list[dict]) -> Pieces:
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    start, end, eot = (tokenizer.special_tokens[name] for name in names)
    pieces = [([tokenizer.bos_id], False)]
    for message in messages:
        head, text = [start, *plain(tokenizer, message["role"]), end], message["content"].strip()
        if message["role"] == "assistant":
            pieces.append(([*head, *plain(tokenizer, "\n\n")], False))
            pieces.append(([*plain(tokenizer, text, "\n\n"), eot], True))
        else:
            pieces.append(([*head, *plain(tokenizer, f"\n\n{text}"), eot], False))
    return pieces


HAND = {
    "ChatML": (CHATML, chatml_by_hand),
    "Llama 2": (LLAMA2, llama2_by_hand),
    "Llama 3": (LLAMA3, llama3_by_hand),
}


def chat_encoder(folder: Path, source: str, kind: str = "ChatML") -> ChatEncoder:
    """An encoder for a model's folder with its tokenizer and a chat template."""
    folder.mkdir(exist_ok=True)
    if kind == "ChatML":
        save_json(folder, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    else:
        file = TOKENIZERS["sentencepiece" if kind == "Llama 2" else "tiktoken"][0]
        shutil.copy(file, folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text(source)
    return ChatEncoder(Tokenizer(folder))


def conversations(n: int) -> list[list[dict]]:
    """Random conversations of 1 to 5 rounds, with names of special tokens in their texts."""
    chance, found = random.Random(5), []
    names = ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "[/INST]", "<|eot_id|>", "\n", " "]
    for _ in range(n):
        roles = ["system"] * chance.randrange(2) + ["user", "assistant"] * chance.randint(1, 5)
        texts = [mixed_text(chance) + chance.choice(names) * chance.randrange(2) for _ in roles]
        texts = [chance.choice(["", " ", "\n"]) + text for text in texts]
        found.append([{"role": role, "content": text} for role, text in zip(roles, texts)])
    return found


@pytest.mark.parametrize("kind", HAND)
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path, kind):
    source, by_hand = HAND[kind]
    encoder = chat_encoder(tmp_path / "m", source, kind)
    as_a_whole = 0
    for messages in conversations(200):
        row = encoder.encode({"messages": messages}, 10**6)
        pieces = by_hand(encoder.template.tokenizer, messages)
        ids = [i for piece, _ in pieces for i in piece]
        labels = [i if learn else -100 for piece, learn in pieces for i in piece]
        assert row == Tokens(ids, labels)
        # The last question is what a chat would be fed; so are those before, but for answers
        # whose first characters merge with what stands before.
        asked = encoder.template.ids(messages[:-1])
        as_a_whole += row.ids[: len(asked)] == asked
    assert as_a_whole > 150


def test_a_turn_of_weight_0_is_not_learned_and_one_of_weight_1_is(tmp_path):
    encoder = chat_encoder(tmp_path / "m", CHATML)
    texts = [("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "22.")]
    messages = [{"role": role, "content": text} for role, text in texts]
    whole = encoder.encode({"messages": messages}, 999)
    first = encoder.encode({"messages": messages[:2]}, 999).ids
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    weighted = encoder.encode({"messages": messages}, 999)
    assert weighted.ids == whole.ids
    assert weighted.labels == [-100] * len(first) + whole.labels[len(first) :]
    assert 0 < weighted.n_learned < whole.n_learned
    with_inputs = weighted.with_inputs()
    learned_first = [i for i, label in enumerate(whole.labels[: len(first)]) if label != -100]
    assert [i for i, label in enumerate(with_inputs.labels) if label == -100] == learned_first
    # What is behind the last answer of weight 1 takes no room.
    messages[1]["weight"], messages[3]["weight"] = 1, 0
    assert encoder.encode({"messages": messages}, len(first)).ids == first


def test_a_default_system_message_and_texts_around_turns_are_not_learned(tmp_path):
    source = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe<|im_end|>{% endif %}"
    encoder = chat_encoder(tmp_path / "m", source + CHATML)
    row = {"prompt": "What?", "completion": "This."}
    ids, labels, *_ = encoder.encode(row, 99)
    tokenizer = encoder.template.tokenizer
    assert (
        labels[-len(learned(Tokens(ids, labels))) :] == ids[-len(tokenizer.encode("This.")) - 1 :]
    )
    assert tokenizer.decode(ids).replace("\n", "|").startswith("system|Be")


def test_the_date_is_the_same_on_all_days(tmp_path):
    encoder = chat_encoder(tmp_path / "m", "{{ strftime_now('%d %B %Y') }}" + CHATML)
    row = encoder.encode({"prompt": "Hi", "completion": "Ho"}, 99)
    assert encoder.template.tokenizer.decode(row.ids).startswith("26 July 2024")


TURN = "{% if m.role == 'user' %}<s>{{ m.content }}{% else %}"
LOOP = "{% for m in messages %}" + TURN
END = "{% endif %}{% endfor %}"
UNCLEAR = {  # templates, and why their conversations cannot be learned
    "no token ends an answer": (LOOP + "{{ m.content }}\n" + END, "no special token ends"),
    "the next question does": (
        LOOP + "{{ m.content }}{{ '<|im_end|>' if loop.last }}" + END,
        "answers do not all end with the same token",
    ),
    "the last one ends otherwise": (
        LOOP + "{{ m.content }}{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}" + END,
        "earlier turns|answers do not all end with the same token",
    ),
    "earlier answers are left out": (
        LOOP + "{{ m.content if loop.last else '' }}<|im_end|>" + END,
        "something else is written",
    ),
    "earlier questions are shortened": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>"
        "{{ m.content if loop.index0 + 2 >= messages | length else '' }}{% else %}"
        "{{ m.content }}<|im_end|>" + END,
        "earlier turns are written otherwise",
    ),
    "no beginning of an answer": (CHATML[: CHATML.index("{% if add")], "something else is written"),
    "another beginning": (
        CHATML.replace("assistant", "assistant: I think"),
        "earlier turns are written otherwise",
    ),
    "answers are changed": (LOOP + "{{ m.content | upper }}<|im_end|>" + END, "something else"),
    "more behind an answer": (LOOP + "{{ m.content }} ok<|im_end|>" + END, "something else"),
    "more behind the end": (
        LOOP + "{{ m.content }}<|im_end|>" + END + "{{ '' if add_generation_prompt else 'bye' }}",
        "answers do not all end with the same token",
    ),
    "it fails": (LOOP + "{{ m.content }}{{ nothing.at.all }}" + END, "the chat template fails"),
    "no system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHATML,
        "the chat template fails: no system role",
    ),
}


@pytest.mark.parametrize(("source", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_a_template_that_does_not_show_its_answers_is_named_and_gives_no_mask(
    tmp_path, source, message
):
    encoder = chat_encoder(tmp_path / "m", source)
    texts = {"system": "Be kind", "user": "one", "assistant": "two"}
    roles = ["system"] * ("no system" in source) + ["user", "assistant"] * 2
    row = {"messages": [{"role": role, "content": texts[role]} for role in roles]}
    file = re.escape(str(tmp_path / "m" / "chat_template.jinja"))
    with pytest.raises(ValueError, match=f"^{file}: .*({message})") as error:
        encoder.encode(row, 99)
    assert "\n" not in str(error.value)


def test_an_empty_answer_shows_no_header_as_an_answer(tmp_path):
    encoder = chat_encoder(tmp_path / "m", CHATML[: CHATML.index("{% if add")])
    with pytest.raises(ValueError, match="same token"):
        encoder.encode({"prompt": "one", "completion": ""}, 99)
    encoder = chat_encoder(tmp_path / "m", CHATML)
    row = encoder.encode({"prompt": "one", "completion": ""}, 99)
    assert learned(row) == [encoder.template.tokenizer.special_tokens["<|im_end|>"]]


# Length


def test_long_conversations_lose_their_oldest_turns_and_keep_the_system_message(tmp_path):
    encoder = chat_encoder(tmp_path / "m", CHATML)
    system = [{"role": "system", "content": "Be kind"}]
    rounds = [
        [{"role": "user", "content": f"{i}" * 5}, {"role": "assistant", "content": f"{i}" * 9}]
        for i in range(6)
    ]

    def row_of(*messages: list[dict]) -> dict:
        return {"messages": [x for some in messages for x in some]}

    whole = [encoder.encode(row_of(system, *rounds[n:]), 10**6) for n in range(7)[:-1]]
    for n, row in enumerate(whole):
        for longest in (len(row.ids), len(row.ids) + 3):
            assert encoder.encode(row_of(system, *rounds), longest) == row._replace(cut=n > 0)
    last = encoder.encode(row_of(rounds[-1]), 10**6)
    shorter = encoder.encode(row_of(system, *rounds), len(last.ids))
    assert shorter == last._replace(cut=True)  # without the system message
    too_long = encoder.encode(row_of(system, *rounds), len(last.ids) - 1)
    assert too_long == last
    asks = encoder.encode(row_of(system, *rounds, rounds[0][:1]), 10**6)
    assert asks == whole[0]._replace(asks=True)
