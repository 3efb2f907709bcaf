"""The LLaMA transformer on fairscale's layers: one class for cached generation and for training."""

import math
import reprlib
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as mpu
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

SMALL_SUM = 1 << 16  # elements over all ranks, below which latency and not bandwidth counts


@dataclass
class ModelArgs:
    """The hyperparameters that Meta's params.json holds; the FFN size follows from them.

    Raises ValueError for values that describe no model.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1 in Llama 1's params.json: take it from the weights
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False  # Llama 3.1 and later
    rope_scaling_factor: float = 8.0
    rope_high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"):
            value = getattr(self, name)
            unset = name == "vocab_size" and value == -1
            if type(value) is not int or not (unset or 0 < value < 2**31):
                raise ValueError(f"{name} must be a positive integer, not {reprlib.repr(value)}")
        if self.ffn_dim_multiplier is None:
            self.ffn_dim_multiplier = 1.0
        for name in (
            "ffn_dim_multiplier",
            "norm_eps",
            "rope_theta",
            "rope_scaling_factor",
            "rope_high_freq_factor",
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e12:
                raise ValueError(f"{name} must be a positive number, not {reprlib.repr(value)}")
        if type(self.use_scaled_rope) is not bool:
            value = reprlib.repr(self.use_scaled_rope)
            raise ValueError(f"use_scaled_rope must be true or false, not {value}")
        if self.rope_high_freq_factor == 1:
            raise ValueError("rope_high_freq_factor must differ from the low one, which is 1")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of n_heads {self.n_heads}")
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
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Rows of w1 and w3, by the rule of Meta's reference code."""
        hidden = int(self.ffn_dim_multiplier * int(2 * (4 * self.dim) / 3))
        return self.multiple_of * -(-hidden // self.multiple_of)

    @property
    def common_divisor(self) -> int:
        """What every number of shards must divide."""
        return math.gcd(self.n_heads, self.vocab_size, self.hidden_dim, self.dim)

    def valid_shard_counts(self) -> list[int]:
        """Every n into which this model can be cut, ascending."""
        divisors = [n for n in range(1, self.common_divisor + 1) if self.common_divisor % n == 0]
        return [n for n in divisors if self.n_kv_heads % n == 0 or n % self.n_kv_heads == 0]


def _unallocated(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


# fairscale's own constructors allocate each weight and, for more than one rank, the full matrix to
# cut it from. Ours come from a checkpoint, so only the shape is laid down here.


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """fairscale's embedding, cut on the embedding dimension, its weight not yet allocated."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight = _unallocated(
            num_embeddings, embedding_dim // mpu.get_model_parallel_world_size()
        )


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """fairscale's linear layer, cut on the output dimension, its weight not yet allocated."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.gather_output, self.bias = False, None
        self.weight = _unallocated(out_features // mpu.get_model_parallel_world_size(), in_features)


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """fairscale's linear layer, cut on the input dimension, its weight not yet allocated."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.input_is_parallel, self.bias = True, None
        self.weight = _unallocated(out_features, in_features // mpu.get_model_parallel_world_size())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return sum_over_ranks(product(x, self.weight))


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _unallocated(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def column_parallel(x: torch.Tensor, *layers: ColumnParallelLinear) -> list[torch.Tensor]:
    """Apply several column-parallel layers to one input.

    fairscale's forward all-reduces the input's gradient once a layer; here one serves them all.
    """
    if torch.is_grad_enabled():
        x = copy_to_model_parallel_region(x)
    return [product(x, layer.weight) for layer in layers]


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in_features) times the transpose of weight (out_features, in_features).

    For one row in float32 on a CPU, torch's kernel reads the weight with a single thread. Given as
    a batch of slices, each thread reads its own: 1.6 times as fast on two cores.
    """
    threads = torch.get_num_threads()
    one_row = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) == x.dim() - 1 == 1
    if not one_row or threads == 1 or weight.shape[0] % threads or torch.is_grad_enabled():
        return F.linear(x, weight)
    slices = weight.view(threads, -1, weight.shape[1]).transpose(1, 2)
    return torch.bmm(x.expand(threads, 1, -1), slices).view(1, -1)


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's x, the same on each to the last bit. For inference only.

    On a CPU, little is gathered and added up at home: for one token's states gloo's all_reduce
    takes 2.5 times as long as its all_gather.
    """
    n, group = mpu.get_model_parallel_world_size(), mpu.get_model_parallel_group()
    if n == 1:
        return x
    if x.device.type == "cpu" and x.numel() * n <= SMALL_SUM:
        parts = x.new_empty((n, *x.shape))
        dist.all_gather(list(parts.unbind(0)), x, group=group)
        return parts.sum(0)
    dist.all_reduce(x, group=group)
    return x


def rope_frequencies(args: ModelArgs) -> torch.Tensor:
    """Angle of each rotary pair per position, (head_dim / 2,) float32 (Su et al., 2021).

    With use_scaled_rope, long wavelengths are stretched as Llama 3.1 does for a context of 8192.
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    if not args.use_scaled_rope:
        return freqs
    turns = 8192 * freqs / (2 * math.pi)  # over the context that the model was first trained on
    smooth = ((turns - 1) / (args.rope_high_freq_factor - 1)).clamp(0, 1)
    return freqs * (smooth + (1 - smooth) / args.rope_scaling_factor)


def apply_rotary_emb(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs (2i, 2i+1) of x (bsz, seqlen, heads, head_dim) by position."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)


class KVCache:
    """Keys and values of one batch, of just the size that the batch needs."""

    def __init__(self, model: "Transformer", bsz: int, max_len: int) -> None:
        weight = model.norm.weight
        shape = (model.args.n_layers, 2, bsz, max_len, model.n_local_kv_heads, model.args.head_dim)
        # Zeros: what a row has not written yet is masked, but 0 times NaN would still be NaN.
        self.layers = torch.zeros(shape, dtype=weight.dtype, device=weight.device).unbind(0)
        self.rows = torch.arange(bsz, device=weight.device)[:, None]  # (bsz, 1)


class Attention(nn.Module):
    """Grouped-query attention; a rank holds its own query heads and the KV heads they read."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        world_size = mpu.get_model_parallel_world_size()
        self.head_dim = args.head_dim
        kv_dim = max(args.n_kv_heads, world_size) * args.head_dim  # replicated below one a rank
        self.wq = ColumnParallelLinear(args.dim, args.dim)
        self.wk = ColumnParallelLinear(args.dim, kv_dim)
        self.wv = ColumnParallelLinear(args.dim, kv_dim)
        self.wo = RowParallelLinear(args.dim, args.dim)

    def forward(
        self, x: torch.Tensor, span: "Span", cached: torch.Tensor | None = None
    ) -> torch.Tensor:
        xq, xk, xv = (
            y.view(span.bsz, -1, y.shape[-1] // self.head_dim, self.head_dim)
            for y in column_parallel(x, self.wq, self.wk, self.wv)
        )  # (bsz, seqlen, n_local_heads, head_dim)
        rotated = apply_rotary_emb(torch.cat((xq, xk), dim=2), span.freqs_cis)
        xq, xk = rotated.split((xq.shape[2], xk.shape[2]), dim=2)
        if cached is not None:
            keys, values = cached
            keys[span.written] = xk
            values[span.written] = xv
            xk, xv = keys[:, : span.end], values[:, : span.end]
        output = F.scaled_dot_product_attention(
            xq.transpose(1, 2),  # (bsz, n_local_heads, seqlen, head_dim)
            xk.transpose(1, 2),  # (bsz, n_local_kv_heads, end, head_dim)
            xv.transpose(1, 2),
            attn_mask=span.mask,
            is_causal=span.is_causal,
            enable_gqa=xq.shape[2] != xk.shape[2],
        )
        return self.wo(output.transpose(1, 2).reshape(x.shape[0], -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = column_parallel(x, self.w1, self.w3)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: torch.Tensor, span: "Span", cached: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), span, cached)
        return x + self.feed_forward(self.ffn_norm(x))


@dataclass
class Span:
    """Which positions a pass covers and what each may look at; the same for every layer."""

    bsz: int
    freqs_cis: torch.Tensor  # (bsz or 1, seqlen, 1, head_dim / 2) complex
    mask: torch.Tensor | None  # (bsz, 1, seqlen, end) bool, True where a query may look
    is_causal: bool
    written: tuple | None = None  # index of the cache (bsz, max_len, ...) that the pass writes
    end: int = 0  # the cache is read up to here


class Transformer(nn.Module):
    """LLaMA. Built without memory: load_state_dict(..., assign=True) brings the weights."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.n_local_kv_heads = max(1, args.n_kv_heads // mpu.get_model_parallel_world_size())
        self.gradient_checkpointing = False
        self.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size)
        self.register_buffer("rope_freqs", rope_frequencies(args), persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (bsz, seqlen, vocab_size) float32 of whole sequences, full on every rank.

        input_ids (bsz, seqlen) or inputs_embeds (bsz, seqlen, dim); attention_mask (bsz, seqlen),
        0 where a position is padding. Positions count from 0 at the first column, padded or not.
        """
        h = self.hidden_states(input_ids, inputs_embeds, attention_mask)
        return self.gather_logits(h)

    def hidden_states(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        start_pos: list[int] | None = None,
    ) -> torch.Tensor:
        """What the output layer reads, (bsz, seqlen, dim), after the last norm.

        With a cache, row i covers positions start_pos[i] onward, and sees what is cached before.
        """
        if inputs_embeds is None:
            h = self.tok_embeddings(input_ids)
        else:
            h = inputs_embeds.to(self.norm.weight.dtype)
        bsz, seqlen, dim = h.shape
        if cache is None:
            span = self._whole_span(h, attention_mask)
        else:
            span = self._cached_span(h, cache, start_pos)
        # Products of matrices are leaner than of batches.
        h = h.reshape(-1, dim)  # (bsz * seqlen, dim)
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, span, use_reentrant=False)
            else:
                h = layer(h, span, None if cache is None else cache.layers[i])
        return self.norm(h).view(bsz, seqlen, dim)

    def local_logits(self, h: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits, (..., vocab_size / n), in the weights' dtype."""
        return column_parallel(h, self.output)[0]

    def gather_logits(self, h: torch.Tensor) -> torch.Tensor:
        """The logits (..., vocab_size) float32, full on every rank."""
        return gather_from_model_parallel_region(self.local_logits(h)).float()

    def _freqs_cis(self, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[..., None, None].float() * self.rope_freqs
        return torch.polar(torch.ones_like(angles), angles)  # (bsz, seqlen, 1, head_dim / 2)

    def _whole_span(self, h: torch.Tensor, attention_mask: torch.Tensor | None) -> Span:
        bsz, seqlen, _ = h.shape
        freqs_cis = self._freqs_cis(torch.arange(seqlen, device=h.device)[None])
        # Padding on the right needs no mask: causal attention never looks there.
        if attention_mask is None or not (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            return Span(bsz, freqs_cis, mask=None, is_causal=True)
        causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=h.device).tril()
        mask = causal & attention_mask.bool()[:, None, None, :]
        # A padded position looks at itself: a softmax over nothing would be NaN.
        mask |= torch.eye(seqlen, dtype=torch.bool, device=h.device)
        return Span(bsz, freqs_cis, mask, is_causal=False)

    def _cached_span(self, h: torch.Tensor, cache: KVCache, start_pos: list[int]) -> Span:
        bsz, seqlen, _ = h.shape
        start, end = min(start_pos), max(start_pos) + seqlen
        starts = torch.tensor(start_pos, device=h.device)[:, None]
        positions = starts + torch.arange(seqlen, device=h.device)  # (bsz, seqlen)
        freqs_cis = self._freqs_cis(positions)
        if end - start == seqlen:  # all rows at the same place
            written, needs_mask = (slice(None), slice(start, end)), start > 0 and seqlen > 1
        else:
            written, needs_mask = (cache.rows, positions), True
        if not needs_mask:
            return Span(bsz, freqs_cis, None, seqlen > 1, written, end)
        mask = torch.arange(end, device=h.device) <= positions[:, None, :, None]
        return Span(bsz, freqs_cis, mask, False, written, end)
