"""The LLaMA transformer on fairscale's layers: one class for cached generation and for training."""

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as mpu
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.cache import KVCache, padding_mask
from llama.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RMSNorm,
    RowParallelLinear,
    attends_in_groups,
    column_parallel,
    computes,
)

RECOMPUTED_TOGETHER = 2  # layers: the input of the first is held, in backward what they compute


@dataclass
class ModelArgs:
    """The hyperparameters that Meta's params.json holds; the FFN size follows from them.

    Raises ValueError for values that describe no model.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    # None, which no model has once it is made: as many as n_heads
    n_kv_heads: int = None  # type: ignore[assignment]
    vocab_size: int = -1  # -1 in Llama 1's params.json: take it from the weights
    multiple_of: int = 256
    ffn_dim_multiplier: float = None  # type: ignore[assignment]  # None: 1
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False  # Llama 3.1 and later
    rope_scaling_factor: float = 8.0
    rope_high_freq_factor: float = 4.0
    # Those that follow are ours: params.json holds them only where a model has others.
    rope_low_freq_factor: float = 1.0
    rope_original_len: int = 8192  # the context that scaled rope stretches
    rope_linear_factor: float = 1.0  # angles are divided by it
    head_dim: int = None  # type: ignore[assignment]  # None: dim / n_heads
    context_len: int | None = None  # of the longest texts that it was trained on; None: unknown

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.ffn_dim_multiplier is None:
            self.ffn_dim_multiplier = 1.0
        sizes = ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "rope_original_len"]
        sizes += ["vocab_size"] if self.vocab_size != -1 else []
        sizes += [x for x in ("head_dim", "context_len") if getattr(self, x) is not None]
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise ValueError(f"{name} must be a positive integer, not {reprlib.repr(value)}")
        rope = [f"rope_{x}_factor" for x in ("scaling", "low_freq", "high_freq", "linear")]
        for name in ("ffn_dim_multiplier", "norm_eps", "rope_theta", *rope):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e12:
                raise ValueError(f"{name} must be a positive number, not {reprlib.repr(value)}")
        if type(self.use_scaled_rope) is not bool:
            value = reprlib.repr(self.use_scaled_rope)
            raise ValueError(f"use_scaled_rope must be true or false, not {value}")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if high <= low:
            raise ValueError(f"rope_high_freq_factor {high} must be above the low one, {low}")
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even, for rotary pairs")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        if self.hidden_dim < 1:
            raise ValueError(f"ffn_dim_multiplier {self.ffn_dim_multiplier} leaves no FFN")

    @classmethod
    def from_params(cls, params: dict) -> "ModelArgs":
        """The arguments in a params.json; keys that do not shape the model are left aside."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in params.items() if key in known})

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    def kv_parts(self, n: int) -> int:
        """Parts into which n ranks cut the KV heads. With fewer heads, neighbours share a part."""
        return min(n, self.n_kv_heads)

    def n_local_kv_heads(self, n: int) -> int:
        """KV heads that each of n ranks holds."""
        return self.n_kv_heads // self.kv_parts(n)

    @property
    def hidden_dim(self) -> int:
        """Rows of w1 and w3, by the rule of Meta's reference code."""
        hidden = int(self.ffn_dim_multiplier * int(2 * (4 * self.dim) / 3))
        return self.multiple_of * -(-hidden // self.multiple_of)


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Angle of each rotary pair per position, (head_dim / 2,) float32 (Su et al., 2021).

    With use_scaled_rope, long wavelengths are stretched as Llama 3.1 does.
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents / args.rope_linear_factor
    if not args.use_scaled_rope:
        return freqs
    turns = args.rope_original_len * freqs / (2 * math.pi)
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (smooth + (1 - smooth) / args.rope_scaling_factor)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring pairs (2i, 2i+1) of x (bsz, seqlen, heads, head_dim) by position."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention; a rank holds its own query heads and the KV heads they read."""

    def __init__(self, layer: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        n = mpu.get_model_parallel_world_size()
        kv_dim = n * args.n_local_kv_heads(n) * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.q_dim)
        self.wk = ColumnParallelLinear(args.dim, kv_dim)
        self.wv = ColumnParallelLinear(args.dim, kv_dim)
        self.wo = RowParallelLinear(args.q_dim, args.dim)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = (
            y.view(bsz, seqlen, -1, self.head_dim)  # (bsz, seqlen, n_local_heads, head_dim)
            for y in column_parallel(x, self.wq, self.wk, self.wv)
        )
        # Together: a step of one token is made of few numbers and many calls.
        n_heads, n_kv_heads = xq.shape[2], xk.shape[2]
        xqk = torch.cat((xq, xk), 2)
        del xq, xk  # of a prompt they take memory
        xqk = apply_rotary_emb(xqk, freqs_cis)
        # 0, or NaN where a query or key is NaN or infinite: torch's attention on CPUs gives 0 for
        # scores that are NaN, and the model would go on without that layer.
        broken = (xqk * 0).sum((1, 2, 3))[:, None, None]  # (bsz, 1, 1)
        xq, xk = xqk.split((n_heads, n_kv_heads), 2)
        if cache is not None:
            xk, xv = cache.update(self.layer, xk, xv)
        output = attend(xq, xk, xv, mask)
        return self.wo(output.flatten(2) + broken)  # (bsz, seqlen, dim)


def attend(xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with queries (bsz, seqlen, n_heads, head_dim), in a kernel that every card has.

    xk, xv (bsz, end, n_kv_heads, head_dim); mask as KVCache.advance gives it. Returns what is of
    the queries' shape. With heads in groups, torch (2.13) multiplies a mask or float32 by plain
    matrices on most cards: keys and values widened and repeated, every token, every layer.
    """
    bsz, seqlen, n_heads, head_dim = xq.shape
    n_kv_heads, dtype = xk.shape[2], xq.dtype
    # Where a CPU does not compute in half precision, its attention takes 2.5 times as long.
    if xq.device.type == "cpu" and not computes(dtype):
        xq, xk, xv = xq.float(), xk.float(), xv.float()
    grouped = n_heads != n_kv_heads
    if grouped and seqlen == 1:  # the heads of a group as the queries of one
        xq = xq.view(bsz, n_kv_heads, -1, head_dim).transpose(1, 2)
        grouped = False
    elif grouped and (mask is not None or not attends_in_groups(xq.dtype, xq.device)):
        xk, xv = (x.repeat_interleave(n_heads // n_kv_heads, 2) for x in (xk, xv))
        grouped = False
    output = F.scaled_dot_product_attention(
        xq.transpose(1, 2),  # (bsz, n_heads, seqlen, head_dim), or (bsz, n_kv_heads, group, …)
        xk.transpose(1, 2),  # (bsz, as many or n_kv_heads, end, head_dim)
        xv.transpose(1, 2),
        attn_mask=None if mask is None else mask.to(xq.dtype),
        is_causal=mask is None and seqlen > 1,
        enable_gqa=grouped,
    )
    output = output.to(dtype) if seqlen == 1 else output.to(dtype).transpose(1, 2)
    return output.reshape(bsz, seqlen, n_heads, head_dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = column_parallel(x, self.w1, self.w3)  # (bsz, seqlen, hidden_dim / n)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual."""

    offloaded = False  # its matrices are here only while it runs: see Offload

    def __init__(self, layer: int, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(layer, args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        recompute_ffn: bool = False,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs_cis, mask, cache)
        return x + (recomputed(self._ffn, x) if recompute_ffn else self._ffn(x))

    def _ffn(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.ffn_norm(x))


def run(layers: Sequence[TransformerBlock], x: Tensor, *args: Any) -> Tensor:
    """Apply layers one after the other."""
    for layer in layers:
        x = layer(x, *args)
    return x


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call a function, of which autograd then holds the arguments alone, and calls it again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class Transformer(nn.Module):
    """LLaMA. Built without memory: load_state_dict(..., assign=True) brings the weights."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.n_local_kv_heads = args.n_local_kv_heads(mpu.get_model_parallel_world_size())
        # What training computes twice rather than hold: layers, two at a time (Chen et al., 2016);
        # or of each the FFN, most of what it would hold (Korthikanti et al., 2022).
        self.gradient_checkpointing = False
        self.recompute_ffn = True
        self.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size)
        self.rope_freqs: Tensor
        self.register_buffer("rope_freqs", rope_frequencies(args), persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute logits (bsz, seqlen, vocab_size) float32 of whole sequences, full on every rank.

        input_ids (bsz, seqlen) or inputs_embeds (bsz, seqlen, dim); attention_mask (bsz, seqlen),
        0 where a position is padding. Positions count from 0 at the first column, padded or not.
        """
        h = self.hidden_states(input_ids, inputs_embeds, attention_mask)
        return self.gather_logits(h)

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        start_pos: list[int] | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Compute what the output layer reads, (bsz, seqlen, dim), after the last norm.

        With a cache, row i covers positions start_pos[i] onward, and sees what is cached before;
        starts (bsz,) is the same on the device, where it is there already.
        """
        if inputs_embeds is None:
            h = self.tok_embeddings(input_ids)  # (bsz, seqlen, dim)
        else:
            h = inputs_embeds.to(self.norm.weight.dtype)
            del inputs_embeds  # or it would be in memory as long as this runs
        seqlen = h.shape[1]
        if cache is None:
            positions = torch.arange(seqlen, device=h.device)[None]  # (1, seqlen)
            mask = padding_mask(attention_mask, h.dtype)
        else:
            positions, mask = cache.advance(start_pos or [0] * len(h), seqlen, starts)
        freqs_cis = self.rotations(positions)[..., None, :]  # (…, seqlen, 1, head_dim / 2)
        trained = torch.is_grad_enabled()
        for layers in self._recomputed_together():
            if trained and (self.gradient_checkpointing or layers[0].offloaded):
                h = recomputed(run, layers, h, freqs_cis, mask, cache)
            else:
                h = run(layers, h, freqs_cis, mask, cache, trained and self.recompute_ffn)
        return self.norm(h)

    def _recomputed_together(self) -> list[list[TransformerBlock]]:
        """The layers in groups, of which a backward pass computes one after the other anew."""
        layers: list[Any] = list(self.layers)
        # An offloaded layer's matrices are gone when those of the one behind the next come.
        alone = any(layer.offloaded for layer in layers) or not self.gradient_checkpointing
        n = 1 if alone else RECOMPUTED_TOGETHER
        return [layers[i : i + n] for i in range(0, len(layers), n)]

    def rotations(self, positions: Tensor) -> Tensor:
        """Compute by what rotary pairs are turned at positions (…), complex (…, head_dim / 2)."""
        angles = positions[..., None].float() * self.rope_freqs
        return torch.polar(torch.ones_like(angles), angles)

    def local_logits(self, h: Tensor) -> Tensor:
        """Compute this rank's columns of the logits, (..., vocab_size / n), in its dtype."""
        return column_parallel(h, self.output)[0]

    def gather_logits(self, h: Tensor) -> Tensor:
        """Compute the logits (..., vocab_size) float32, full on every rank."""
        return gather_from_model_parallel_region(self.local_logits(h)).float()
