"""The model as PEFT and the Trainer see it, and the trainable prompt in front of it."""

import warnings

import peft
import torch
import torch.distributed as dist
import transformers
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from llama import parallel
from llama.checkpoint.hf import hf_config
from llama.model import Transformer
from llama.tuning.data import IGNORE
from llama.tuning.methods import reparametrise


class LlamaForPromptTuning(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Give our Transformer a loss, and the config that PEFT asks for. No weights of its own.

    PEFT wants a GenerationMixin; what generates is LLaMA.generate.
    """

    config_class = transformers.LlamaConfig

    def __init__(self, transformer: Transformer, name_or_path: str = "") -> None:
        super().__init__(hf_config(transformer.args, name_or_path=name_or_path))
        self.transformer = transformer
        self.gradient_scale = 1.0  # more in float16: see add_soft_prompt

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **_: object,
    ) -> CausalLMOutput:
        """Return the mean loss of labelled tokens, or without labels the logits.

        num_items_in_batch, which the Trainer gives, replaces the number of labelled tokens as what
        the sum is divided by. All ranks return the same loss. Shapes: inputs and labels
        (bsz, seqlen), logits (bsz, seqlen, vocab_size).
        """
        h = self.transformer.hidden_states(input_ids, inputs_embeds, attention_mask)
        if labels is None:
            return CausalLMOutput(logits=self.transformer.gather_logits(h))
        targets = labels[:, 1:]
        learned = targets != IGNORE
        # Only learned positions get logits, and each rank makes those of its part of the
        # vocabulary: tokens × vocab_size numbers are never anywhere together.
        logits = self.transformer.local_logits(h[:, :-1][learned]).float()
        losses = vocab_parallel_cross_entropy(logits, targets[learned])
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(count).clamp(min=1)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * self.gradient_scale)
        return CausalLMOutput(loss=loss)


def add_soft_prompt(
    transformer: Transformer,
    num_virtual_tokens: int,
    init_ids: list[int] | None,
    ckpt_dir: str,
    method: str = "prompt",
    init: str = "text",
) -> peft.PeftModel:
    """Put a trainable prompt, in float32, in front of the model; all else is frozen.

    init: what it starts from: "rows" and "text" are the embeddings of init_ids, cut or repeated to
    its length, "vocab" those of random tokens (also for no init_ids), "random" random vectors. The
    same on all ranks if their seeds are. method: what it is computed from, as in
    llama.tuning.methods.
    """
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 warns of
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(LlamaForPromptTuning(transformer, str(ckpt_dir)), config)
    norm, start = transformer.norm.weight, None
    if init != "random":
        if init == "vocab" or not init_ids:
            init_ids = torch.randint(transformer.args.vocab_size, (num_virtual_tokens,)).tolist()
        repeated = (init_ids * num_virtual_tokens)[:num_virtual_tokens]
        start = transformer.tok_embeddings(torch.tensor([repeated], device=norm.device))[0].float()
    reparametrise(encoder_of(model).embedding, method, start)
    scale = 1.0
    if norm.dtype == torch.float16:
        # float16 has no room for small gradients: they pass through the model enlarged.
        scale = model.get_base_model().gradient_scale = 1024.0
    for trained in encoder_of(model).parameters():
        # Of each batch, before it is added to those of earlier ones: the replicas' rows together.
        trained.register_hook(
            lambda gradient: parallel.sum_over_replicas((gradient / scale).contiguous())
        )
        if parallel.world_size() > 1:
            # All ranks have the same gradient; where their cards round apart, rank 0's holds.
            trained.register_post_accumulate_grad_hook(_take_from_rank_0)
    return model


def _take_from_rank_0(trained: torch.Tensor) -> None:
    assert trained.grad is not None
    dist.broadcast(trained.grad, src=0)


def encoder_of(model: peft.PeftModel) -> peft.PromptEmbedding:
    """PEFT's module of the prompt; its parameters are all that is trained."""
    return model.prompt_encoder["default"]


def soft_prompt_of(model: peft.PeftModel) -> torch.Tensor:
    """The prompt as it is now, (num_virtual_tokens, dim) float32."""
    return encoder_of(model).embedding.weight
