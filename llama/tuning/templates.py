"""Rows as token ids with labels: in Alpaca's template, in a chat template, in none."""

import datetime
import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama.files import naming
from llama.template import ChatTemplate, Messages
from llama.tokenizer import CONFIG, TEMPLATE, Tokenizer
from llama.tuning.options import ALPACA_PREAMBLE
from llama.tuning.rows import Form, Row

# The two templates of Stanford Alpaca, to the letter: tuned models expect them so.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = ALPACA_PREAMBLE + "\n\n### Instruction:\n{instruction}\n\n### Response:"

# The second as a chat template, with bos for what the tokenizer puts in front of a text. Of several
# turns Alpaca says nothing: here each follows like the first, without the preamble.
CHAT_TEMPLATE = (
    "{%% if messages[0].role == 'system' %%}"
    "{{ raise_exception('the tuned prompt takes no system message') }}{%% endif %%}"
    "{{ %(bos)s + %(preamble)s }}{%% for message in messages %%}{%% if message.role == 'user' %%}"
    r"{{ '\n\n### Instruction:\n' + message.content + '\n\n### Response:' }}"
    "{%% else %%}{{ message.content }}{%% endif %%}{%% endfor %%}"
)

IGNORE = -100  # the label that torch's and fairscale's losses leave out

# What chat templates are told that ask for the date, or a run that is resumed tomorrow would see
# other rows. Those of Llama 3.1 to 3.3 write this one where they cannot ask.
DATE = datetime.datetime(2024, 7, 26)


class Tokens(NamedTuple):
    """A row: its ids, and those that are to be learned, with IGNORE in the place of all others."""

    ids: list[int]
    labels: list[int]
    never: tuple[slice, ...] = ()  # what is not to be learned even where all inputs are
    cut: bool = False  # whether a part was left out to fit
    asks: bool = False  # whether a question at the end was left out, as nothing answers it

    @property
    def n_learned(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)

    def with_inputs(self) -> "Tokens":
        """The same row, with all but what is never learned to be learned."""
        labels = list(self.ids)
        for part in self.never:
            labels[part] = [IGNORE] * len(labels[part])
        return self._replace(labels=labels)


@dataclass
class Question:
    """What stands before the last answer in a row, in token ids; that answer, and its tokens."""

    ids: list[int]
    wanted: str
    n_tokens: int


def question_of(row: dict[str, Any], tokenizer: Tokenizer) -> Question:
    """The last tokens of a row that are learned are the answer, and what is before them asks.

    row: its input_ids and labels as tensors.
    """
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    end = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    start = max((i for i in range(end) if labels[i] == IGNORE), default=-1) + 1
    return Question(ids[:start], tokenizer.decode(ids[start:end]).strip(), end - start)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Put an instruction, with its input if there is one, into Alpaca's template."""
    template = PROMPT_WITH_INPUT if input else PROMPT_NO_INPUT
    # format reads braces in the template alone: those in a user's text stay as they are.
    return template.format(instruction=instruction, input=input)


def alpaca_chat_template(tokenizer: Tokenizer) -> str:
    """The chat template that makes of one user message what alpaca_prompt() and encode() make."""
    bos = "" if tokenizer.bos_id is None else tokenizer.words["bos_token"]
    return CHAT_TEMPLATE % {"bos": json.dumps(bos), "preamble": json.dumps(ALPACA_PREAMBLE)}


def encode_behind(
    encode: Callable[[str], list[int]], prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and of an answer as the model would write them behind the prompt's.

    Generation is fed encode(prompt), so no token may span the two. They are encoded together,
    since SentencePiece puts a space in front of every text, and the prompt's tokens taken off.
    Only where the two merge (":" with another ":", or with a line end) the answer goes alone.
    """
    prompt_ids, both = encode(prompt), encode(prompt + answer)
    if both[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, both[len(prompt_ids) :]
    return prompt_ids, encode(answer)


class PromptEncoder:
    """Prompts and answers in Alpaca's template, or in none: the answer and EOS are learned.

    A text is an answer to an empty prompt.
    """

    cutting = "are cut at the end of the answer"

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer, self.alpaca = tokenizer, template == "alpaca"
        self.name = "in Alpaca's template" if self.alpaca else "in no template"
        self.chat_template = alpaca_chat_template(tokenizer) if self.alpaca else None

    def encode(self, row: Row, longest: int) -> Tokens:
        """The tokens of a row, cut to the longest length if that leaves some of the answer."""
        prompt = prompt_of(row)
        if self.alpaca:
            prompt = alpaca_prompt(row.get("instruction", prompt), row.get("input", ""))
        begin = self.tokenizer.encode("")  # BOS, where the model takes one
        prompt_ids, answer_ids = encode_behind(self._ids, prompt, answer_of(row))
        prompt_ids = begin + prompt_ids
        ids = [*prompt_ids, *answer_ids, self.tokenizer.eos_id]
        labels = [IGNORE] * len(prompt_ids) + ids[len(prompt_ids) :]
        if len(ids) > longest:  # of a prompt that leaves no room, what would have to fit
            n = max(longest, len(prompt_ids) + 1)
            return Tokens(ids[:n], labels[:n], cut=True)
        return Tokens(ids, labels)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False)


def prompt_of(row: Row) -> str:
    """What comes before the answer in a row that is no conversation."""
    parts = (row.get(name) for name in ("prompt", "instruction", "input"))
    return "\n\n".join(part for part in parts if part)


def answer_of(row: Row) -> str:
    """The answer in a row that is no conversation, or its whole text."""
    return next(row[name] for name in ("output", "completion", "text") if name in row)


class ChatEncoder:
    """Conversations in a tokenizer's chat template: the assistant's turns of weight 1 are learned.

    A turn is what stands behind the text that a chat asks the model to continue, up to and with the
    special token that ends it. Where that is not the turn's own text, there is no telling what the
    template does, and ValueError says so.
    """

    cutting = "are without their oldest turns"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.template = ChatTemplate.of(tokenizer)
        self.chat_template = self.template.source
        file = tokenizer.files.get(TEMPLATE, tokenizer.files.get(CONFIG))
        if self.template.name:
            self.file = tokenizer.model_path
            self.name = f"in the chat template of {self.template.name}: the tokenizer has none"
        else:
            self.file = file if isinstance(file, Path) else tokenizer.model_path
            self.name = f"in the chat template of {self.file}"

    def encode(self, row: Row, longest: int) -> Tokens:
        """The tokens of a row, without as many turns at its beginning as it takes to fit.

        The system message stays, unless the last question and answer do not fit with it.
        """
        messages = row.get("messages") or [
            {"role": "user", "content": prompt_of(row)},
            {"role": "assistant", "content": answer_of(row)},
        ]
        asks = messages[-1]["role"] == "user"
        messages = messages[: len(messages) - asks]
        while messages[-1].get("weight") == 0:  # nothing behind the last answer is to be learned
            messages = messages[:-2]
        with naming(self.file):
            whole = self._tokens(messages)
            if len(whole.ids) <= longest:
                return whole._replace(asks=asks)
            n_system = int(messages[0]["role"] == "system")
            turns = messages[n_system:]
            for system in (messages[:n_system], [])[: 1 + n_system]:
                shorter = [[*system, *turns[n:]] for n in range(0, len(turns), 2)]
                n = bisect_left(shorter, True, key=lambda x: len(self._tokens(x).ids) <= longest)
                if n < len(shorter):
                    return self._tokens(shorter[n])._replace(cut=True, asks=asks)
            return self._tokens(turns[-2:])  # too long

    def _tokens(self, messages: Messages) -> Tokens:
        text, turns = self._turns(messages)
        answers = [x for x in messages if x["role"] == "assistant"]
        ids: list[int] = []
        labels: list[int] = []
        never: list[slice] = []
        done = 0
        for message, (start, end, n_end) in zip(answers, turns, strict=True):
            # From the special token that ends the turn before: nothing merges with that. But it is
            # there, as what is at the beginning of a text may be encoded in another way.
            asked, answer = encode_behind(self.template.encode, text[done:start], text[start:end])
            asked = asked[bool(ids) :]
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
            if message.get("weight") == 0:
                never.append(slice(len(ids) - len(answer), len(ids)))
                labels[never[-1]] = [IGNORE] * len(answer)
            done = end - n_end
        return Tokens(ids, labels, tuple(never))

    def _turns(self, messages: Messages) -> tuple[str, list[tuple[int, int, int]]]:
        """A conversation as a text, and where in it each of the assistant's turns is.

        Of each the start, the end, and the length of the special token before the end.
        """
        text = self._render(messages, add_generation_prompt=False)
        turns: list[tuple[int, int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self._render(messages[:i])
                start, end = len(asked), self.template.special.search(text, len(asked))
                if not text.startswith(asked) or (turns and start < turns[-1][1]):
                    raise _unclear("earlier turns are written otherwise than the last one")
                if end is None:
                    raise _unclear("no special token ends an answer")
                if (
                    text[start : end.start()].strip()
                    != self.template.guard(message["content"]).strip()
                ):
                    raise _unclear("where an answer belongs, something else is written")
                turns.append((start, end.end(), len(end[0])))
        ends = {text[end - n_end : end] for _, end, n_end in turns}
        if len(ends) > 1 or self.template.special.sub("", text[turns[-1][1] :]).strip():
            raise _unclear("answers do not all end with the same token")
        return text, turns

    def _render(self, messages: Messages, **given: bool) -> str:
        plain = [{"role": x["role"], "content": x["content"]} for x in messages]
        return self.template.render(plain, date=DATE, **given)


def _unclear(why: str) -> ValueError:
    return ValueError(
        f"in this chat template it is not certain which tokens are an answer's: {why}; give "
        "another, or rows of one question and one answer, which --template alpaca takes too"
    )


def encoder_for(
    form: Form, tokenizer: Tokenizer, template: str | None
) -> PromptEncoder | ChatEncoder:
    """What makes tokens of rows; by default in the first template that such rows go into."""
    template = template or form.templates[0]
    if template not in form.templates:
        raise ValueError(
            f"--template {template} does not go with {form.name}: {' or '.join(form.templates)}"
        )
    return ChatEncoder(tokenizer) if template == "chat" else PromptEncoder(tokenizer, template)
