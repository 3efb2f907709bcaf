"""Layers whose matrices stay in host memory and come to the card one layer ahead of their turn."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llama import parallel
from llama.cli import say

PIECE = 1 << 23  # numbers pinned at once: torch rounds their bytes up to a power of two
ALIGNMENT = 256  # bytes: where in a buffer a matrix may begin


def layers_to_offload(n_layers: int, n: int, device: torch.device) -> list[int]:
    """Choose n layers, evenly spread: while others run one is copied. On a CPU none, which is said.

    Raises ValueError for more layers than there are.
    """
    if not 0 <= n <= n_layers:
        raise ValueError(f"--offload must be from 0 to the model's {n_layers} layers, not {n}")
    if n and device.type == "cpu":
        say(
            f"--offload {n}: does nothing on a CPU: there, weights in Meta's format and their own "
            "dtype are mapped files, and may be larger than memory"
        )
        return []
    return [i for i in range(n_layers) if (i + 1) * n // n_layers > i * n // n_layers]


def bus_speed(device: torch.device, n_bytes: int = 1 << 26) -> float:
    """Measure how many bytes a second go from pinned host memory to a device."""
    host = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    card, seconds = torch.zeros(n_bytes, dtype=torch.uint8, device=device), []
    for _ in range(3):
        began = parallel.now()
        card.copy_(host, non_blocking=True)
        seconds.append(parallel.now() - began)
    return n_bytes / min(seconds)


class Offload:
    """The matrices of some layers, in host memory, and two buffers on the card that take turns.

    From here on a layer's matrices are no parameters or buffers of its modules but plain
    attributes, set when it is called: model.to(device) does not see them. Vectors (norms) stay.
    In training such a layer is computed anew in backward, which brings its matrices again.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.places, self.host, shapes = [], [], []  # each layer's: (module, name); pieces; meta
        for layer in layers:
            self.places.append(_places_of(layer))
            matrices = [getattr(*place).detach() for place in self.places[-1]]
            for place in self.places[-1]:
                delattr(*place)
            pieces = _pieces(matrices)
            self.host.append([x.pin_memory() for x in pieces] if device.type == "cuda" else pieces)
            shapes.append([matrix.to("meta") for matrix in matrices])
        sizes = [sum(x.nbytes + ALIGNMENT for x in matrices) for matrices in shapes]
        self.n_bytes = sum(sizes)
        self.buffers = torch.empty((2, max(sizes)), dtype=torch.uint8, device=device)
        self.views = [[_views(buffer, like) for like in shapes] for buffer in self.buffers]
        self.held = [-1, -1]  # whose matrices are in each buffer
        self.api = torch.get_device_module(device)  # torch.cuda; torch.cpu's streams do nothing
        self.stream = self.api.Stream()
        self.filled = [self.api.Event(), self.api.Event()]
        for i, layer in enumerate(layers):
            layer.offloaded = True  # type: ignore[assignment]  # see TransformerBlock
            layer.register_forward_pre_hook(functools.partial(self._take_turn, i))

    def _take_turn(self, i: int, *_: object) -> None:
        """Have layer i find its matrices, and the next layer's be copied while it runs."""
        if i not in self.held:
            self._fetch(i, 0)
        buffer, n = self.held.index(i), len(self.host)
        self.filled[buffer].wait()
        for place, matrix in zip(self.places[i], self.views[buffer][i]):
            setattr(*place, matrix)
        # In training a backward pass follows a forward one, else another forward one.
        back = torch.is_grad_enabled() and i > 0 and (i == n - 1 or self.held[1 - buffer] == i + 1)
        ahead = (i - 1 if back else i + 1) % n
        if ahead not in self.held:
            self._fetch(ahead, 1 - buffer)

    def _fetch(self, i: int, buffer: int) -> None:
        """Copy layer i's matrices into a buffer when all that the card was given before is done."""
        self.stream.wait_stream(self.api.current_stream())
        with self.api.stream(self.stream):
            for place, piece in zip(_pieces(self.views[buffer][i]), self.host[i]):
                place.copy_(piece, non_blocking=True)
            self.filled[buffer].record()
        self.held[buffer] = i

    def say_cost(self) -> None:
        """Say what is in host memory, and what that costs a token at the speed of this bus."""
        n, speed = len(self.host), bus_speed(self.buffers.device)
        seconds = self.n_bytes / speed if n > 2 else 0
        say(
            f"--offload {n}: {self.n_bytes / 1e6:,.0f} MB of weights stay in host memory; the bus "
            f"moves {speed / 1e9:.1f} GB a second, so a token takes at least {seconds:.3f} s"
        )


def _places_of(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a layer's matrices are: their modules, and their names there."""
    return [
        (module, name)
        for module in layer.modules()
        for name, x in {**module._parameters, **module._buffers}.items()
        if x is not None and x.dim() > 1
    ]


def _pieces(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [piece for matrix in matrices for piece in matrix.flatten().split(PIECE)]


def _views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Matrices of the shapes and dtypes of others, one behind the other in a buffer."""
    views, start = [], 0
    for x in like:
        views.append(buffer[start : start + x.nbytes].view(x.dtype).view(x.shape))
        start += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    return views
