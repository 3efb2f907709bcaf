"""What a prompt is made of while it is trained. Whatever that is, it comes out as plain vectors."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

HIDDEN = 512  # width of the networks
# What a step changes of a prompt is to be many times what it changes of a network's weights.
SCALE = 30.0


class Residual(nn.Module):
    """The prompt and what a network of two layers, which all its vectors share, adds to it.

    Residual prompt tuning: Razdaibiedina et al., 2023, arXiv 2305.03937, section 3. Here the
    network begins by adding nothing, and reads the vectors at a length of its own choice, since
    those of one model are much longer than those of another; the paper has a LayerNorm behind it
    instead. Of the prompt its change from start (num_virtual_tokens, dim) is trained, in units of
    SCALE, so that one learning rate suits it and the network.
    """

    start: torch.Tensor

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        dim = start.shape[1]
        self.register_buffer("start", start.clone())
        self.down, self.up = nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, dim)
        _zero(self.up)

    def forward(self, change: torch.Tensor) -> torch.Tensor:
        """Return the prompt that the model gets, (num_virtual_tokens, dim)."""
        prompt = self.start + SCALE * change
        return prompt + self.up(F.relu(self.down(F.rms_norm(prompt, prompt.shape[-1:]))))


class PTuning(nn.Module):
    """What a network of three layers makes of random vectors that are trained with it.

    P-tuning: Liu et al., 2021, arXiv 2103.10385, section 3, in PEFT's form with MLP. start, where
    there is one, is added; the network then begins by giving nothing.
    """

    def __init__(self, start: torch.Tensor | None, dim: int) -> None:
        super().__init__()
        hidden = nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()
        last = nn.Linear(HIDDEN, dim)
        self.head = nn.Sequential(*hidden, last)
        self.register_buffer("start", start)
        if start is not None:
            _zero(last)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the prompt that the model gets, (num_virtual_tokens, dim)."""
        made = self.head(vectors)
        return made if self.start is None else self.start + made


def _zero(layer: nn.Linear) -> None:
    """Let a layer begin by giving zeros."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def reparametrise(embedding: nn.Embedding, method: str, start: torch.Tensor | None) -> None:
    """Give a prompt's embedding its start, and what the method computes it from.

    start: (num_virtual_tokens, dim), or None for random vectors. .weight is then the computed
    prompt, whoever asks for it; the parameters are what is trained.
    """
    weight = embedding.weight
    if start is not None:
        weight.data.copy_(start)
    if method == "residual":
        network: nn.Module = Residual(weight.data)
        nn.init.zeros_(weight)
    elif method == "p_tuning":
        network = PTuning(start, weight.shape[1])
        nn.init.normal_(weight)
    else:
        return
    parametrize.register_parametrization(embedding, "weight", network.to(weight.device))


def network_size(method: str, dim: int) -> int:
    """Count the numbers of a method's network."""
    if method == "prompt":
        return 0
    with torch.device("meta"):
        network = Residual(torch.empty(0, dim)) if method == "residual" else PTuning(None, dim)
    return sum(parameter.numel() for parameter in network.parameters())
