"""The model card of a tuned prompt: what it was trained on, how well it does, how it is used."""

import dataclasses
import math

from llama import cli
from llama.tuning.options import TuningOptions
from llama.tuning.run_folder import SAMPLES, best_of

METHODS = {
    "prompt": "prompt tuning (arXiv 2104.08691): the vectors themselves were trained",
    "p_tuning": "P-tuning (arXiv 2103.10385): computed by a network while it was trained",
    "residual": "residual prompt tuning (arXiv 2305.03937): a network added to it while trained",
}
NOT_SHOWN = (
    "ckpt_dir",
    "dataset_path",
    "output_dir",
    "tokenizer_path",
    "resume",
)  # named elsewhere, or of no use

CARD = """---
library_name: peft
pipeline_tag: text-generation
tags:
- prompt-tuning
---

# A soft prompt of {num_virtual_tokens} tokens for {ckpt_dir}

{num_virtual_tokens} vectors that stand in front of every prompt, before its first token (BOS).
The model itself is as it was. Trained by {method}.

| | |
|---|---|
| base model | {ckpt_dir}: {base} |
| data | {dataset_path}: {rows} |
| SHA-256 of the data | {dataset_sha256} |
{losses}
| options | {options} |

## Use

```sh
python example_ft.py --ckpt_dir {ckpt_dir}{tokenizer} --tuning_ckpt_path {output_dir}
python convert_model.py --from {ckpt_dir} --out_dir DIR --to gguf --tuning_ckpt_path {output_dir}
```

The second puts the prompt into the vocabulary of a model for llama.cpp and others. In Python, with
PEFT, on a Hugging Face folder of the same model, as this makes one:
`python convert_model.py --from {ckpt_dir} --out_dir HF_FOLDER --to hf`
(`AutoPeftModelForCausalLM` finds none, as the base model is in another format.)

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("HF_FOLDER"), "{output_dir}")
```
"""


def model_card(
    options: TuningOptions, facts: dict, n_rows: tuple[int, int], log_history: list[dict]
) -> str:
    """Write the card of a run.

    facts: of the model and the data, by name. n_rows: trained on, and held out.
    """
    sizes = [f"{key} {facts[key]}" for key in ("dim", "n_layers", "n_heads", "vocab_size")]
    given = [
        f"`--{field.name} {cli.shown(str(value))}`"
        for field in dataclasses.fields(options)
        if field.name not in NOT_SHOWN and (value := getattr(options, field.name)) != field.default
    ]
    held_out = f", {n_rows[1]} held out" if n_rows[1] else ""
    path = options.tokenizer_path
    shown = dataclasses.asdict(options) | facts | {"method": METHODS[options.method]}
    return CARD.format(
        **shown
        | {
            "tokenizer": f" --tokenizer_path {path}" if path else "",
            "base": ", ".join([*sizes, str(facts["dtype"])]),
            "rows": f"{n_rows[0]} rows trained on{held_out}",
            "losses": "\n".join(f"| {when} | {loss} |" for when, loss in _losses(log_history)),
            "options": ", ".join(given) or "the defaults",
        }
    )


def _losses(log_history: list[dict]) -> list[tuple[str, str]]:
    """Losses before and after, as lines of the table."""
    best = best_of(log_history)
    if best is not None:
        before = next(row for row in log_history if "eval_loss" in row)
        return [
            (
                f"evaluation at step {row['step']}",
                f"loss {row['eval_loss']:.4f}, perplexity "
                f"{math.exp(row['eval_loss']):.2f}" + f"; this prompt ({SAMPLES})" * (row is best),
            )
            for row in (before, best)
        ]
    rows = [row for row in log_history if "loss" in row]
    return [
        (f"training at step {row['step']}", f"loss {row['loss']:.4f}")
        for row in rows[:1] + rows[-1:]
    ]
