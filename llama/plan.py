"""What each of n ranks needs in memory, counted from a model's sizes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama.batch import chunk_of
from llama.checkpoint.weights import Source, bits_of, cut_of, kind_of, weight_shapes
from llama.layers import WIDENED_ROWS, attends_in_groups, computes
from llama.model import RECOMPUTED_TOGETHER
from llama.options import dtype_name
from llama.quantize import GROUPS, group_bytes

SAMPLED = 33  # bytes a logit at the peak of Sampler: five float32, ids, cumulated, compared


def weight_bytes(
    name: str, shape: Sequence[int], dtype: torch.dtype, quantize: str | None = None
) -> int:
    """The size in memory of a weight, or of a part of this shape; in dtype where not quantised.

    Raises ValueError for a part that does not divide into groups.
    """
    bits = bits_of(name, quantize) if quantize else 0
    if not bits:
        return math.prod(shape) * dtype.itemsize
    for group in GROUPS[bits]:
        if shape[1] % group == 0:
            return math.prod(shape) // group * group_bytes(bits, group)
    raise ValueError(
        f"--quantize {quantize}: {name} has {shape[1]} inputs a rank, which groups of "
        f"{GROUPS[bits][-1]} do not divide; take fewer ranks, or leave it out"
    )


@dataclass(frozen=True)
class Plan:
    """What each of n ranks needs, in bytes, to run bsz rows of seqlen tokens at once.

    seqlen: with num_virtual_tokens of a soft prompt. offload: layers whose
    matrices stay in host memory. network: numbers that are trained beside the soft prompt's.
    learned: tokens of a row that have a loss; None: in tuning all, in generation none.
    """

    ckpt: Source
    n: int
    dtype: torch.dtype
    bsz: int
    seqlen: int
    device: torch.device
    quantize: str | None = None
    offload: int = 0
    tuning: bool = False
    gradient_checkpointing: bool = False
    recompute_ffn: bool = True  # in tuning
    num_virtual_tokens: int = 0
    network: int = 0
    learned: int | None = None

    def _parts(self, name: str = "") -> Iterator[tuple[str, int]]:
        """Each weight whose name begins so, with the size of a rank's part of it."""
        ckpt = self.ckpt
        as_it_is = self.quantize == ckpt.quantize
        shapes = ckpt.shapes if as_it_is else weight_shapes(ckpt.args)  # of quantised ones bytes
        for found, shape in shapes.items():
            if found.startswith(name):
                part = cut_of(found, ckpt.args, self.n).shape(shape)
                size = math.prod(part) * ckpt.dtype_of(found, self.dtype).itemsize
                if not as_it_is:
                    size = weight_bytes(found, part, self.dtype, self.quantize)
                yield found, size

    @property
    def numbers(self) -> str:
        """What numbers the weights are of, for people."""
        dtype = dtype_name(self.dtype)
        return f"{self.quantize} and {dtype}" if self.quantize else dtype

    @property
    def mapped(self) -> int:
        """Of weights that stay files mapped into memory: the kernel drops and reads them again."""
        if self.device.type != "cpu":
            return 0
        stays = (
            size
            for name, size in self._parts()
            if not (self.quantize and bits_of(name, self.quantize))
            and self.ckpt.stays_mapped(name, self.n, self.dtype)
        )
        return sum(stays)

    @property
    def pinned(self) -> int:
        """Of weights that stay in host memory beside a card."""
        parts = self._parts("layers.0.")
        layer = sum(size for name, size in parts if kind_of(name).cut is not None)
        return self.offload * layer if self.device.type != "cpu" else 0

    @property
    def weights(self) -> int:
        """Of weights in the rank's own memory, with the two buffers through which others come."""
        buffers = 2 * self.pinned // max(self.offload, 1)
        return sum(size for _, size in self._parts()) - self.mapped - self.pinned + buffers

    @property
    def cache(self) -> int:
        """Of keys and values (KVCache); none in tuning."""
        args = self.ckpt.args
        kv_dim = args.n_local_kv_heads(self.n) * args.head_dim
        numbers = 2 * args.n_layers * self.bsz * self.seqlen * kv_dim
        return 0 if self.tuning else numbers * self.dtype.itemsize

    @property
    def soft_prompt(self) -> int:
        """Of the soft prompt, float32; in tuning with its gradient and AdamW's two means."""
        numbers = self.num_virtual_tokens * self.ckpt.args.dim + self.network
        return (16 if self.tuning else 4) * numbers

    @property
    def activations(self) -> int:
        """Of what a prefill of all rows, or a step of tuning, holds at its peak beside all else.

        Counted from what Transformer allocates. Sizes: d, q, kv, f of a token's states, queries,
        keys and FFN on this rank, b bytes a number.
        """
        args, b = self.ckpt.args, self.dtype.itemsize
        with_loss = self.tuning or self.learned is not None
        positions = self.seqlen if with_loss else min(self.seqlen, chunk_of(self.bsz))
        tokens = self.bsz * positions  # in one pass
        d, q, f = args.dim, args.q_dim // self.n, args.hidden_dim // self.n
        kv = args.n_local_kv_heads(self.n) * args.head_dim
        on_cpu = self.device.type == "cpu"
        # Products by way of float32, a few rows of the matrix at a time: see layers.linear().
        widened = on_cpu and not computes(self.dtype)  # attention too
        by_float = self.quantize is not None or widened
        # Keys and values: see attend().
        grouped = attends_in_groups(self.dtype, self.device) and not widened
        repeated = kv < q and (not grouped or positions < self.seqlen)
        block = 4 * WIDENED_ROWS * (tokens + f) if by_float else 0
        of_row = self.seqlen - self.num_virtual_tokens
        learned = self.bsz * min(of_row if self.learned is None else self.learned, of_row)
        logits = 2 * learned * args.vocab_size // self.n * 4  # and their softmax, in float32
        if not self.tuning:
            # The layer's input, the same after attention, normed; gate, up, silu, and the product
            # of both, or what it is multiplied to by way of float32.
            ffn = 3 * d * b + 4 * f * b
            if by_float:
                ffn = max(ffn, 4 * d * b + 3 * f * b + 4 * f)
            # The layer's input, normed; values; queries and keys in float32, turned, as before.
            turned = b + 4 if b == 4 else b + 4 + 4 + b
            # Then these, what attend() repeats, and its output.
            looks = (q + 2 * q * self.seqlen // positions) * b * repeated
            attention = (2 * d + kv) * b + max((q + kv) * turned, (q + kv) * b + looks)
            angles = 8 + 6 * args.head_dim  # positions, float32 angles, complex64 turns
            prefill = tokens * (angles + max(ffn, attention)) + block
            if with_loss:  # PEFT holds the embeddings; then states, those learned, and logits
                prefill = tokens * d * b + max(prefill, 2 * tokens * d * b + logits)
            return max(prefill, self.bsz * args.vocab_size * SAMPLED)
        # RMSNorm on a CPU keeps its input in float32; a copy, where that is not what there is.
        normed = 4 if on_cpu else b
        # What autograd keeps of a layer: its norm's input; turned queries and keys, values,
        # attention's output and its float32 log-sums; and of the FFN the norm's input, gate, up,
        # silu, or its own input alone. Or of the layer, or of some together, the input alone.
        attended = 2 * (q + (q if repeated else kv)) * (4 if widened else b)
        attended += d * normed + 4 * q // args.head_dim
        ffn = d * normed + 3 * f * b
        kept = attended + (d * b if self.recompute_ffn else ffn)
        recomputed = args.n_layers if self.gradient_checkpointing else self.offload
        together = 1 if self.offload else min(RECOMPUTED_TOGETHER, args.n_layers)
        layers = math.ceil(recomputed / together) * d * b + (args.n_layers - recomputed) * kept
        embeddings = d * b if normed != b and not recomputed else 0
        # At the loss: the last norm's input and output, and logits.
        prompts = 4 * self.bsz * self.num_virtual_tokens * d  # PEFT's, one for each row
        loss = tokens * (d * normed + d * b) + logits + prompts
        # In the last layer's backward pass: the gradient of its output; of the product, and of
        # both that were multiplied, or of one by way of float32, in two halves of a sum.
        backward = tokens * (d * b + max(3 * f * b, 8 * f if by_float else 0)) + block
        if recomputed:
            again = together * (attended + ffn)
            backward += tokens * (again - (d * b if normed == b else 0))
        elif self.recompute_ffn:
            backward += tokens * (ffn - (d * b if normed == b else 0))
        forward = tokens * (4 * d * b + (f + d) * b + 4 * f) + block if by_float else 0
        return tokens * (layers + embeddings) + max(loss, backward, forward)

    @property
    def total(self) -> int:
        """All of it; mapped files and pinned host memory apart."""
        return self.weights + self.cache + self.activations + self.soft_prompt

    def but(self, **changes: Any) -> "Plan":
        """The same with changes."""
        return dataclasses.replace(self, **changes)
