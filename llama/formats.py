"""What the readers of other formats share: Meta's names, sizes and shapes, and how errors read."""

import contextlib
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama.checkpoint import first_few, weight_shapes
from llama.model import ModelArgs

LAYER_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path in front of the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err


def positive_int(config: dict, key: str, default: int | None = None) -> int:
    """A whole number of 1 or more from a model's configuration, else ValueError."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key} is {reprlib.repr(value)}; expected a whole number of 1 or more")
    return value


def positive_number(config: dict, key: str, default: float | None = None) -> float:
    """A number above 0 (and below 1e12) from a model's configuration, else ValueError."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise ValueError(f"{key} is {reprlib.repr(value)}; expected a number above 0")
    return float(value)


def ffn_params(dim: int, hidden: int) -> dict:
    """The params.json entries from which Meta's formula gives this hidden size of the FFN."""
    base = int(2 * 4 * dim / 3)
    if -(-base // 256) * 256 == hidden:
        return {"multiple_of": 256}
    if hidden >= base:
        return {"multiple_of": hidden}
    factor = hidden / base
    # The product may fall one short of hidden, which rounding up to multiple_of makes good.
    if int(factor * base) < 1:
        raise ValueError(f"FFN size {hidden} is too small for dim {dim}")
    return {"multiple_of": hidden, "ffn_dim_multiplier": factor}


def meta_names(found: Iterable[str], table: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """A format's name of each weight, by Meta's name, and the names that are not in the table.

    The table goes from the format's names to Meta's, both with N for the number of the layer.
    """
    names, unknown = {}, []
    for name in found:
        layer = LAYER_NUMBER.search(name)
        pattern = LAYER_NUMBER.sub("N", name, count=1)
        if pattern in table:
            names[table[pattern].replace("N", layer[0] if layer else "N")] = name
        else:
            unknown.append(name)
    return names, unknown


def check_shapes(found: dict[str, tuple[int, ...]], args: ModelArgs) -> None:
    """Raise ValueError, by Meta's names, for weights that are missing, unexpected or misshapen."""
    # A file must not make us list more layers than it holds weights.
    if args.n_layers > len(found):
        raise ValueError(f"{len(found)} weights are too few for {args.n_layers} layers")
    wanted = weight_shapes(args)
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unexpected" for name in found if name not in wanted]
    faults += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise ValueError(first_few(faults, "; "))
