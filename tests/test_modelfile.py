"""Ollama's Modelfile: the chat template as Ollama has it, and templates that fail."""

import pytest
from conftest import run_script

from llama.checkpoint.modelfile import modelfile, render

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = {"tokenizer.ggml.tokens": ["<s>", "</s>", "a"], "tokenizer.ggml.eos_token_id": 1}
USER = [{"role": "user", "content": "Hi"}]


def with_template(template: str, **more) -> dict:
    return VOCABULARY | {"tokenizer.chat_template": template} | more


def test_the_template_is_written_around_what_ollama_puts_in():
    system = "<|im_start|>system\n{{ .System }}<|im_end|>\n"
    user = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
    template = f"{{{{ if .System }}}}{system}{user}{{{{ else }}}}{user}{{{{ end }}}}"
    assert modelfile("m.gguf", with_template(CHATML)) == (
        f'FROM ./m.gguf\nTEMPLATE """{template}{{{{ .Response }}}}"""\nPARAMETER stop "</s>"\n'
    )


def test_without_a_template_there_is_the_prefix_or_nothing():
    assert modelfile("m.gguf", VOCABULARY) == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
    baked = VOCABULARY | {"llama.soft_prompt.prefix": "<|soft_0|><s>"}
    assert 'TEMPLATE """<|soft_0|><s>{{ .Prompt }}{{ .Response }}"""' in modelfile("m", baked)


@pytest.mark.parametrize("added", [True, False])
def test_bos_is_written_where_nobody_adds_it(added):
    fields = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": added}
    text = render("{{ bos_token }}x{{ eos_token }}", USER, with_template("", **fields))
    assert text == ("x</s>" if added else "<s>x</s>")


BAD_TEMPLATES = {
    "raises": ("{{ raise_exception('only two roles') }}", "only two roles"),
    "syntax": ("{% for %}", "Expected"),
    "unknown name": ("{{ tools.x }}", "'tools' is undefined"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "changes what it was given": ("{{ messages.append(1) }}", "unsafe"),
    "endless range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "does not end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_template_that_fails_is_one_line(template, message):
    with pytest.raises(ValueError, match=f"chat template fails: .*{message}"):
        modelfile("m.gguf", with_template(template))


def test_a_template_that_takes_too_long_ends_the_program(tmp_path):
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (tmp_path / "script.py").write_text(
        "from llama.checkpoint import modelfile\n"
        "modelfile.TIME_LIMIT = 1\n"
        f"modelfile.render({loop!r}, [], {{}})\n"
    )
    result = run_script(tmp_path / "script.py")
    assert result.returncode == 1
    assert "error: after 1 s the tokenizer's chat template is still at work" in result.stderr
