"""Ollama's Modelfile beside a GGUF file: how Ollama is to put a prompt into the chat template."""

import datetime

from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama.cli import shown, time_limit

TIME_LIMIT = 30  # seconds for a template, which is a stranger's program


def modelfile(name: str, vocabulary: dict) -> str:
    """Ollama's Modelfile for a GGUF file of this name with this metadata.

    Ollama does not read the chat template in the file: it has a language of its own. So the
    template is rendered around Ollama's words for the prompt and the system's message.
    """
    template = vocabulary.get("tokenizer.chat_template")
    prefix = vocabulary.get("llama.soft_prompt.prefix", "")
    lines = [f"FROM ./{name}"]
    if template is not None:
        user = {"role": "user", "content": "{{ .Prompt }}"}
        system = {"role": "system", "content": "{{ .System }}"}
        alone, after = (render(template, x, vocabulary) for x in ([user], [system, user]))
        text = f"{{{{ if .System }}}}{after}{{{{ else }}}}{alone}{{{{ end }}}}"
    else:
        text = prefix + "{{ .Prompt }}"
    lines += [f'TEMPLATE """{text}{{{{ .Response }}}}"""'] if template or prefix else []
    tokens = vocabulary["tokenizer.ggml.tokens"]
    ends = {vocabulary.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")} - {None}
    lines += [f'PARAMETER stop "{tokens[i]}"' for i in sorted(ends)]
    return "\n".join(lines) + "\n"


def render(template: str, messages: list[dict], vocabulary: dict) -> str:
    """A conversation in a chat template, up to where the answer begins.

    Raises ValueError for a template that fails; one that hangs ends the program.
    """

    def refuse(message: str) -> None:
        raise ValueError(message)

    def text_of(field: str) -> str:
        i = vocabulary.get(f"tokenizer.ggml.{field}_token_id")
        return "" if i is None else vocabulary["tokenizer.ggml.tokens"][i]

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    added = vocabulary.get("tokenizer.ggml.add_bos_token")  # then whoever runs it adds BOS
    words = {"bos_token": "" if added else text_of("bos"), "eos_token": text_of("eos")}
    try:
        with time_limit(
            TIME_LIMIT, f"after {TIME_LIMIT} s the tokenizer's chat template is still at work"
        ):
            return jinja.from_string(template).render(
                messages=messages, add_generation_prompt=True, **words
            )
    except Exception as error:
        raise ValueError(f"the tokenizer's chat template fails: {shown(str(error))}") from None
