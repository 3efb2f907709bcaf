"""manifest.json: what each weight and each shard of a folder holds, so that damage is noticed.

It holds the SHA-256 of each whole weight, its rows in order, which does not depend on the number of
shards, and of each of the parts that the shards hold of it; the size of each shard; and the size
and SHA-256 of the tokenizer's files, which may be absent but not be others. A shard's bytes around
the weights (a zip archive's headers, checksums and directory) are not hashed: what a reader takes
from them shows in the weights' names, shapes and bytes, and the rest nobody reads.
"""

import dataclasses
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.checkpoint.weights import cut_of, tokenizer_in
from llama.cli import counted, first_few
from llama.files import hash_of, naming, read_json, write_json
from llama.model import ModelArgs
from llama.options import dtype_name

NAME = "manifest.json"
FORMAT = 2
WEIGHT = {"shape": list, "dtype": str, "sha256": str, "parts": list}
FILE = {"size": int, "sha256": str}
LONGEST = 1 << 24  # bytes; a model of 80 layers in 16 shards takes 2 MB


@dataclass
class Manifest:
    """What manifest.json says."""

    params: dict  # as in params.json
    weights: dict[str, dict]  # by name: shape, dtype, sha256 of the whole, and of its parts
    shards: dict[str, int]  # by file: its size
    files: dict[str, dict]  # of the tokenizer: size, sha256

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Read the manifest of a folder; None if it has none, ValueError if it cannot be one."""
        path = folder / NAME
        if not os.path.lexists(path):
            return None
        content = read_json(path, LONGEST)
        known = content.pop("format", None)
        if known != FORMAT:
            raise ValueError(
                f"{path}: format {reprlib.repr(known)}, but this program knows {FORMAT}; remove "
                "the file, and cut the folder anew with split_model.py to have one again"
            )
        fits = (
            _has(content, {"params": dict, "weights": dict, "shards": dict, "files": dict})
            and all(_has(weight, WEIGHT) for weight in content["weights"].values())
            and all(_has(file, FILE) for file in content["files"].values())
            and all(type(size) is int for size in content["shards"].values())
        )
        if not fits:
            raise ValueError(
                f"{path}: unreadable: an entry is missing, unknown or of another type; without "
                "the file the folder can be used unverified"
            )
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        write_json(folder / NAME, {"format": FORMAT} | dataclasses.asdict(self))

    def check_files(self, folder: Path, paths: Sequence[Path]) -> None:
        """Raise ValueError unless the shards are those listed here, by name and, if there, size.

        And for a file of the tokenizer that is another than the one listed.
        """
        here, there = {path.name for path in paths}, self.shards.keys()
        if here != there:
            raise ValueError(
                f"{folder}: holds {counted(len(here), 'shard')}, but {NAME} lists {len(there)} "
                f"({first_few(sorted(here ^ there))} in only one of the two); was the folder "
                "copied in part, or are two mixed?"
            )
        for path in filter(Path.exists, paths):
            size, wanted = path.stat().st_size, self.shards[path.name]
            if size != wanted:
                raise ValueError(
                    f"{path}: {size} bytes long, but {NAME} says {wanted}; copy it again"
                )
        for name, path in tokenizer_in(folder).items():
            # Sizes first: a file that is not the one listed may be endless.
            listed = self.files.get(name)
            same_size = listed and path.stat().st_size == listed["size"]
            if listed and not (same_size and describe_file(path) == listed):
                raise ValueError(
                    f"{path}: not the file that {NAME} lists; copy it again, or, if it is meant "
                    f"to change, take it out of {NAME}"
                )

    def check_params(self, folder: Path, args: ModelArgs) -> None:
        """Raise ValueError unless params.json says what it said when this was written."""
        with naming(folder / NAME):
            said = dataclasses.asdict(ModelArgs.from_params(self.params))
        found = dataclasses.asdict(args)
        changed = [
            f"{key} {found[key]}, not {said[key]}" for key in said if said[key] != found[key]
        ]
        if changed:
            raise ValueError(
                f"{folder / 'params.json'}: says {first_few(changed)} as {folder / NAME} does; put "
                f"the old values back, or, if they are meant to change, remove {NAME}"
            )

    def check_model(
        self,
        folder: Path,
        args: ModelArgs,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, torch.dtype],
    ) -> None:
        """Raise ValueError unless this describes the weights of the model in so many shards."""
        described = describe_weights(shapes, dtypes)
        said = {
            name: {key: weight[key] for key in ("shape", "dtype")}
            for name, weight in self.weights.items()
        }
        n = len(self.shards)
        if said != described or any(
            len(self.weights[name]["parts"]) != cut_of(name, args, n).parts for name in described
        ):
            raise ValueError(
                f"{folder / NAME}: does not describe the weights of the model in params.json as "
                "they lie in these shards; is it another folder's?"
            )


def _has(table: object, kinds: Mapping[str, type]) -> bool:
    """Whether a value is a table of just these keys, with values of these types."""
    return isinstance(table, dict) and {key: type(x) for key, x in table.items()} == kinds


def describe_file(path: Path) -> dict[str, int | str]:
    """What a manifest says of a file of the tokenizer."""
    return {"size": path.stat().st_size, "sha256": hash_of(path)}


def describe_weights(
    shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]
) -> dict[str, dict]:
    """What a manifest says of every weight of a model, but for its hash."""
    return {
        name: {"shape": list(shape), "dtype": dtype_name(dtypes[name])}
        for name, shape in shapes.items()
    }
