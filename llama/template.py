"""Conversations as a model was trained to read them: chat templates, in jinja2's sandbox."""

import datetime
import functools
import json
from collections.abc import Sequence, Sized
from typing import Any

from jinja2 import Template
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama import parallel
from llama.cli import memory_limit, shown, time_limit
from llama.files import check_text
from llama.tokenizer import Tokenizer, any_of

TIME_LIMIT = 30  # seconds for a template, which is a stranger's program
MEMORY_LIMIT = 1 << 30  # bytes
LONGEST = 1 << 24  # characters that one operation in it may make

ROLES = ("system", "user", "assistant", "tool")

# What models were trained with whose files name no template: Meta's own code for Llama 2 and 3,
# and ChatML, by tokens that only such models have.
LLAMA2 = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate, the user first') }}{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KNOWN = {  # by a token that the vocabulary must have
    "<|start_header_id|>": ("Llama 3", LLAMA3),
    "<|im_start|>": ("ChatML", CHATML),
    "<s>": ("Llama 2", LLAMA2),
}

# Put into names of special tokens that stand in a message, which then are none. It is no character
# of Unicode, but one for a program's own use.
MARK = "\ufdd0"

Messages = Sequence[dict[str, Any]]


class ChatTemplate:
    """How a model wants conversations written, and the ids of such texts.

    source: in jinja2's language. name: of a known template, where no file of the model has one.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str | None = None) -> None:
        self.source, self.tokenizer, self.name = source, tokenizer, name
        self.special = any_of(tuple(tokenizer.special_tokens))

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """The tokenizer's own template, or that of the known models with such a tokenizer.

        Raises ValueError if there is none.
        """
        if tokenizer.chat_template is not None:
            return cls(tokenizer.chat_template, tokenizer)
        for token, (name, source) in KNOWN.items():
            if token in tokenizer.special_tokens:
                return cls(source, tokenizer, name)
        raise ValueError(
            f"{tokenizer.model_path}: comes without a chat template: put the model's "
            "chat_template.jinja or tokenizer_config.json beside it, or send prompts as they are"
        )

    def text(self, messages: Messages) -> str:
        """A conversation, up to where the answer begins. encode() knows what in it is a message's.

        Called by all ranks together. Raises ValueError for a template that fails; one that hangs
        ends the program.
        """
        # On rank 0: it may ask for the date, and the clocks of machines differ.
        return parallel.from_rank_0(lambda: self.render(messages))

    def render(self, messages: Messages, **given: Any) -> str:
        """What text() gives, by this rank alone; given: what render() of this file takes."""
        guarded = [
            {key: value if key == "role" else self.guard(value) for key, value in message.items()}
            for message in messages
        ]
        return render(self.source, guarded, self.tokenizer.words, **given)

    def guard(self, value: Any) -> Any:
        """A text of a message with a MARK in each name of a special token, which is then none."""
        if not isinstance(value, str):
            return value
        value = value.replace(MARK, "")
        return self.special.sub(lambda found: found[0][:1] + MARK + found[0][1:], value)

    def encode(self, text: str) -> list[int]:
        """The ids of what text() gave: its special tokens are the template's own."""
        return self.tokenizer.encode(text, bos=False, special_tokens=True, mark=MARK)

    def ids(self, messages: Messages) -> list[int]:
        """The ids of a conversation, up to where the answer begins."""
        return self.encode(self.text(messages))


def check_messages(where: str, messages: object, asks: bool = True) -> Messages:
    """The messages of a conversation; ValueError for anything else.

    asks: whether it must want an answer.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" must be a list of at least one message')
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            check_text(f"{where}, message {number}", "content", message["content"])
        if role not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{where}, message {number}: expected a role ({', '.join(ROLES)}) and a text as "
                f"content, not {shown(str(message), 80)}"
            )
        if role == "system" and number > 1:
            raise ValueError(f"{where}, message {number}: the system message comes first")
    if asks and messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}: the last message is not the user's, so nothing is to answer")
    return messages


def render(
    source: str,
    messages: Messages,
    words: dict[str, str],
    dated: bool = True,
    date: datetime.datetime | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Run a chat template as transformers does, with names of special tokens as words.

    dated: whether it may ask for the date; date: what it is told then, by default today's.
    add_generation_prompt: whether it is to write what an answer begins with.
    Raises ValueError for a template that fails; one that hangs ends the program.
    """

    def strftime_now(form: str) -> str:
        return (date or datetime.datetime.now()).strftime(form)

    slow = f"after {TIME_LIMIT} s the chat template still runs"
    given = {"tools": None, "documents": None} | words
    clock = {"strftime_now": strftime_now} if dated else {}
    try:
        with time_limit(TIME_LIMIT, slow), memory_limit(MEMORY_LIMIT):
            return compiled(source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **given, **clock
            )
    except Exception as error:
        reason = "it wants too much memory" if isinstance(error, MemoryError) else str(error)
        raise ValueError(f"the chat template fails: {shown(reason)}") from None


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """A chat template as a program, with what transformers gives to all of them."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    extensions = ["jinja2.ext.loopcontrols", GenerationTag]
    jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    jinja.filters["tojson"] = to_json
    jinja.globals["raise_exception"] = refuse
    return jinja.from_string(source)


def to_json(
    x: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers gives it to templates; jinja2's own escapes HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class GenerationTag(Extension):
    """{% generation %}: in training it marks what a model is to learn, here nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        """Take what is inside for what it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which no product becomes longer than LONGEST."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse what takes no range or loop to fill the memory, as "x" * 10**10."""
        sizes = [len(x) if isinstance(x, Sized) else x for x in (left, right)]
        if abs(sizes[0] * sizes[1]) > LONGEST or (operator == "**" and sizes[1] > 64):
            raise ValueError(f"too much for a template: {operator}")
        return super().call_binop(context, operator, left, right)
