"""A tuned prompt put into a model's vocabulary: new tokens whose embeddings it is.

Programs that know no soft prompts then have one: written in front of a text, the tokens give what
the prompt gives. The prompt comes before BOS, so the tokenizer adds none any more.
"""

import numpy as np
import torch

from llama.checkpoint.gguf_tokenizer import CONTROL, UNUSED, tokenizer_files
from llama.checkpoint.laid_out import in_dtype
from llama.checkpoint.modelfile import render
from llama.checkpoint.weights import EMBEDDING, OUTPUT, Source, common_divisor, whole_sha256
from llama.tokenizer import JSON_STOP_NAMES


class BakedSource(Source):
    """A model with the rows of a tuned prompt, (num_virtual_tokens, dim), behind its embeddings.

    vocabulary: GGUF's metadata of the model's tokenizer, as vocabulary_of() gives it. The new one
    is in .vocabulary, as tokenizer files in .files. The vocabulary stays divisible by the numbers
    of shards that the model had. Raises ValueError for a model that has a prompt in it already.
    """

    def __init__(self, source: Source, prompt: torch.Tensor, vocabulary: dict) -> None:
        args = source.args
        common = common_divisor(args)
        vocab_size = -(-(args.vocab_size + len(prompt)) // common) * common
        self.vocabulary = with_prompt(vocabulary, len(prompt), vocab_size)
        params = source.params | {"vocab_size": vocab_size}
        files = tokenizer_files(self.vocabulary, vocab_size)
        super().__init__(source.path, params, source.dtype, files)
        self.source = source
        self.has_hashes, self.stop_ids = source.has_hashes, source.stop_ids
        self.quantised_bytes = source.quantised_bytes
        if source.has_hashes:  # of these nobody can check them with the new rows behind
            for name in (EMBEDDING, OUTPUT):
                source.check_sha256(name, whole_sha256(source, name))
        n_new = vocab_size - args.vocab_size
        unwanted = unwanted_token(vocabulary)
        # A row of zeros would win where all other logits are negative. A copy of a token's row does
        # not, as of equals the first is taken; and what is never wanted is never sampled.
        copy = source.read(OUTPUT, 0, unwanted, unwanted + 1)
        rows = torch.zeros(n_new, args.dim, dtype=source.dtype)
        rows[: len(prompt)] = in_dtype(prompt, source.dtype, "the tuned prompt")
        self.new_rows = {EMBEDDING: rows, OUTPUT: copy.to(source.dtype).repeat(n_new, 1)}

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start to stop of a weight; by default all of it."""
        if name not in self.new_rows:
            return self.source.read(name, dim, start, stop)
        new, n_before = self.new_rows[name], self.source.args.vocab_size
        if dim == 1:
            return torch.cat((self.source.read(name, 1, start, stop).to(new), new[:, start:stop]))
        stop = n_before + len(new) if stop is None else stop
        rows = [new[max(start - n_before, 0) : max(stop - n_before, 0)]]
        if start < n_before:
            rows.insert(0, self.source.read(name, 0, start, min(stop, n_before)).to(new))
        return torch.cat(rows)

    def check_unchanged(self) -> None:
        """Raise ValueError if the model's files were written into since they were opened."""
        self.source.check_unchanged()

    def check_sha256(self, name: str, sha256: str) -> None:
        """Raise ValueError if this is not the SHA-256 of a weight, where one is known."""
        if name not in self.new_rows:
            self.source.check_sha256(name, sha256)

    @property
    def prefix(self) -> str:
        """The text to put in front of every prompt."""
        return self.vocabulary["llama.soft_prompt.prefix"]


def with_prompt(vocabulary: dict, length: int, vocab_size: int) -> dict:
    """A vocabulary with the tokens <|soft_0|> … behind it, filled up to a size.

    Its chat template begins with them. BOS is not added any more: the prefix has it.
    """
    tokens, types = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"]
    if "<|soft_0|>" in tokens:
        raise ValueError(
            "a tuned prompt is in this model already (<|soft_0|>): give the model without it"
        )
    soft = [f"<|soft_{i}|>" for i in range(length)]
    pads = [f"<|soft_pad_{i}|>" for i in range(vocab_size - len(tokens) - length)]
    added = {
        "tokenizer.ggml.tokens": [*tokens, *soft, *pads],
        "tokenizer.ggml.token_type": np.array(
            [*types, *[CONTROL] * length, *[UNUSED] * len(pads)], np.int32
        ),
        "tokenizer.ggml.add_bos_token": False,
    }
    if "tokenizer.ggml.scores" in vocabulary:
        zeros = np.zeros(length + len(pads), np.float32)
        scores = vocabulary["tokenizer.ggml.scores"]
        added["tokenizer.ggml.scores"] = np.concatenate((scores, zeros))
    bos = ""
    if vocabulary["tokenizer.ggml.add_bos_token"]:
        bos = tokens[vocabulary["tokenizer.ggml.bos_token_id"]]
    prefix = "".join([*soft, bos])
    added |= {"llama.soft_prompt.prefix": prefix, "llama.soft_prompt.length": length}
    template = vocabulary.get("tokenizer.chat_template")
    if template is not None:
        in_front = "".join(soft) if _begins_with(bos, template, vocabulary) else prefix
        added["tokenizer.chat_template"] = f"{{{{ '{in_front}' }}}}{template}"
    return vocabulary | added


def _begins_with(bos: str, template: str, vocabulary: dict) -> bool:
    """Whether a chat begins with BOS by itself."""
    question = [{"role": "user", "content": "?"}]
    without = vocabulary | {"tokenizer.ggml.add_bos_token": False}
    try:
        return render(template, question, without).startswith(bos)
    except ValueError:  # it wants more than a question
        return "bos_token" in template


def unwanted_token(vocabulary: dict) -> int:
    """The id of a token that a model never has a reason to choose.

    None that begins or ends anything: behind a turn's end SmolLM2 wants <|im_start|>, its BOS.
    """
    tokens, types = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"]
    unknown = vocabulary.get("tokenizer.ggml.unknown_token_id")
    control = [i for i, kind in enumerate(types) if kind == CONTROL]
    reserved = [i for i in control if "reserved" in tokens[i]]
    wanted = {vocabulary.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    found = [i for i in (unknown, *reserved, *control) if i is not None and i not in wanted]
    return next((i for i in found if tokens[i] not in JSON_STOP_NAMES), 0)
