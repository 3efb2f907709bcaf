"""Ollama's Modelfile: the chat template in Ollama's language, and templates that fail."""

import re

import pytest
from conftest import run_script

from llama.checkpoint.modelfile import modelfile, ollama_template, render

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VOCABULARY = {"tokenizer.ggml.tokens": ["<s>", "</s>", "a"], "tokenizer.ggml.eos_token_id": 1}
VOCABULARY |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": False}


def as_ollama(template: str, messages: list[dict]) -> str:
    """What Ollama makes of a conversation, by the little of its language that we use."""
    system = [x["content"] for x in messages if x["role"] == "system"]
    begin, turns = template.split("{{ range .Messages }}")
    if "{{ if .System }}" in begin:
        with_system, without = begin.removeprefix("{{ if .System }}").split("{{ else }}")
        without = without.removesuffix("{{ end }}")
        begin = with_system.replace("{{ .System }}", system[0]) if system else without
    user, assistant = re.fullmatch(
        r'\{\{ if eq .Role "user" }}(.*)'
        r'\{\{ else if eq .Role "assistant" }}(.*)\{\{ end }}\{\{ end }}',
        turns,
        re.DOTALL,
    ).groups()
    of_role = {"user": user, "assistant": assistant}
    shown = [x for x in messages if x["role"] in of_role]
    return begin + "".join(
        of_role[x["role"]].replace("{{ .Content }}", x["content"]) for x in shown
    )


@pytest.mark.parametrize(
    "template", [CHATML, SMOLLM2, LLAMA2], ids=["ChatML", "SmolLM2", "Llama 2"]
)
def test_ollama_makes_of_a_conversation_what_the_template_makes(template):
    found = ollama_template(template, VOCABULARY)
    chat = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant") * 3]
    for messages in (chat[:1], chat[:3], chat[:5]):
        assert as_ollama(found, messages) == render(template, messages, VOCABULARY)
    if template != LLAMA2:
        messages = [{"role": "system", "content": "Be short"}, *chat[:3]]
        assert as_ollama(found, messages) == render(template, messages, VOCABULARY)


def test_without_a_template_there_is_the_prefix_or_nothing():
    assert modelfile("m.gguf", VOCABULARY) == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
    baked = VOCABULARY | {"llama.soft_prompt.prefix": "<|soft_0|><s>"}
    assert 'TEMPLATE """<|soft_0|><s>{{ .Prompt }}"""' in modelfile("m", baked)


@pytest.mark.parametrize("added", [True, False])
def test_bos_is_written_where_nobody_adds_it(added):
    vocabulary = VOCABULARY | {"tokenizer.ggml.add_bos_token": added}
    text = render("{{ bos_token }}x{{ eos_token }}", [], vocabulary)
    assert text == ("x</s>" if added else "<s>x</s>")


BAD_TEMPLATES = {
    "raises": ("{{ raise_exception('only tools') }}", "only tools"),
    "syntax": ("{% for %}", "Expected"),
    "unknown name": ("{{ weather.x }}", "'weather' is undefined"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "changes what it was given": ("{{ messages.append(1) }}", "unsafe"),
    "endless range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "does not end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "counts messages": (CHATML + "{{ messages | length }}", "not put the same around"),
    "drops messages": ("{{ messages[-1]['content'] }}", "leaves a message out"),
    "Ollama's language": (CHATML + "{{ '{{ .Prompt }}' }}", "for its own language"),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_template_that_does_not_do_is_left_out_and_told(capsys, template, message):
    found = modelfile("m.gguf", VOCABULARY | {"tokenizer.chat_template": template})
    assert found == modelfile("m.gguf", VOCABULARY)
    said = capsys.readouterr().err
    assert said.startswith("the Modelfile has no chat template: ")
    assert message in said


def test_a_template_that_takes_too_long_ends_the_program(tmp_path):
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (tmp_path / "script.py").write_text(
        "from llama import template\n"
        "template.TIME_LIMIT = 1\n"
        f"template.render({loop!r}, [], {{}})\n"
    )
    result = run_script(tmp_path / "script.py")
    assert result.returncode == 1
    assert "error: after 1 s the chat template still runs" in result.stderr
