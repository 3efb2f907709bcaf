"""Ollama's Modelfile beside a GGUF file: the chat template in Ollama's own language."""

import contextlib

from llama.cli import say
from llama.template import render as render_template


def modelfile(name: str, vocabulary: dict) -> str:
    """Ollama's Modelfile for a GGUF file of this name with this metadata.

    A chat template that fails, or is none of those that Ollama can have, is left out and told.
    """
    lines = [f"FROM ./{name}"]
    template = vocabulary.get("tokenizer.chat_template")
    prefix = vocabulary.get("llama.soft_prompt.prefix")
    if template is not None:
        try:
            lines.append(f'TEMPLATE """{ollama_template(template, vocabulary)}"""')
        except ValueError as error:
            say(f"the Modelfile has no chat template: {error}")
    if len(lines) == 1 and prefix is not None:
        lines.append(f'TEMPLATE """{prefix}{{{{ .Prompt }}}}"""')
    tokens = vocabulary["tokenizer.ggml.tokens"]
    ends = {vocabulary.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    lines += [f'PARAMETER stop "{tokens[i]}"' for i in sorted(i for i in ends if i is not None)]
    return "\n".join(lines) + "\n"


def ollama_template(template: str, vocabulary: dict) -> str:
    """What a chat template puts between the messages of a conversation, in Ollama's language.

    Found out by rendering marks. Raises ValueError for a template that does not put the same
    between the messages wherever these stand.
    """
    roles = ("user", "assistant") * 2 + ("user",)
    turns = [{"role": role, "content": f"MARK{i}"} for i, role in enumerate(roles)]
    head, to_answer, to_question, asked = _between(template, turns[:3], vocabulary)
    regular = [head, *[to_answer, to_question] * 2, asked]
    if _between(template, turns, vocabulary) != regular or not to_answer.startswith(asked):
        raise ValueError("it does not put the same around every message")
    begin = head
    system = [{"role": "system", "content": "MARK"}, *turns[:3]]
    with contextlib.suppress(ValueError):  # for a model without system messages
        before, after, *rest = _between(template, system, vocabulary)
        if rest == [to_answer, to_question, asked]:
            begin = "{{ if .System }}" + before + "{{ .System }}" + after
            begin += "{{ else }}" + head + "{{ end }}"
    user = "{{ .Content }}" + asked
    assistant = to_answer.removeprefix(asked) + "{{ .Content }}" + to_question
    return (
        begin + '{{ range .Messages }}{{ if eq .Role "user" }}' + user
        + '{{ else if eq .Role "assistant" }}' + assistant + "{{ end }}{{ end }}"
    )  # fmt: skip


def _between(template: str, messages: list[dict], vocabulary: dict) -> list[str]:
    """What a chat template puts before, between and behind the messages."""
    rest, found = render(template, messages, vocabulary), []
    for message in messages:
        before, mark, rest = rest.partition(message["content"])
        if not mark:
            raise ValueError("it leaves a message out")
        found.append(before)
    found.append(rest)
    if any(word in text for text in found for word in ("{{", '"""')):
        raise ValueError("Ollama would take a part of it for its own language")
    return found


def render(template: str, messages: list[dict], vocabulary: dict) -> str:
    """A conversation in a chat template, with the names of special tokens in GGUF's metadata."""

    def text_of(field: str) -> str:
        i = vocabulary.get(f"tokenizer.ggml.{field}_token_id")
        return "" if i is None else vocabulary["tokenizer.ggml.tokens"][i]

    added = vocabulary.get("tokenizer.ggml.add_bos_token")  # then whoever runs it adds BOS
    words = {"bos_token": "" if added else text_of("bos"), "eos_token": text_of("eos")}
    return render_template(template, messages, words, dated=False)  # or it keeps today's date
