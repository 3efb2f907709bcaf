"""Files: written whole or not at all, JSON and pickles read without harm, hashes of tensors."""

import contextlib
import fcntl
import hashlib
import json
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llama.cli import shown

# What the pickle of a dict of tensors refers to.
PLAIN = (
    r"collections OrderedDict|torch \w+Storage"
    r"|torch\._utils _rebuild_tensor_v2|torch\._utils _rebuild_parameter"
)
LONGEST_PICKLE = 1 << 26  # bytes; that of a model of 100 layers takes 200 kB
LONGEST_TEXT = 1 << 20  # characters


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside a file; what is written there is synced, then takes its place.

    When the body raises, nothing is left of it and path is as it was.
    """
    partial = partial_name(path)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder under a temporary name, renamed to path when all in it is on the disk.

    Raises ValueError if path is in use, or another process is writing it.
    """
    _check_free(path)
    partial = partial_name(path)
    new_parents = [parent for parent in path.parents if not parent.exists()]
    with contextlib.ExitStack() as stack:
        with naming_refusals(partial):
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(partial, f"{path}: another run is writing it"))
        try:
            _check_free(path)
            for left_over in partial.iterdir():  # by a run that was killed
                remove(left_over)
            yield partial
            for inside in [*partial.iterdir(), partial]:
                _sync(inside)
            with naming_refusals(path):
                partial.rename(path)
            _sync(path.parent)
        except BaseException:
            remove(partial)
            for parent in new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


@contextlib.contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """Hold a folder for this process alone; ValueError with the message if another one does.

    The lock ends with the process, however that ends. Links are not followed.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before may have renamed or removed the folder meanwhile.
            ours = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise ValueError(f"{message}; wait for that one to end")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make a folder, if it is not there, and hold it; ValueError if another run does.

    If there is nothing in it at the end, it goes again.
    """
    with contextlib.ExitStack() as stack:
        with naming_refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.resolve(), f"{folder}: another run writes in it"))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()


def partial_name(path: Path) -> Path:
    """The temporary name under which a file or folder is written."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_free(path: Path) -> None:
    """The name must be free, or that of an empty folder, which a rename can replace."""
    if os.path.ismount(path) or path.is_symlink():
        raise ValueError(f"{path}: a link or mount point; name a new folder inside it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: already there and not empty; remove it or choose another")


def _sync(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    with naming_refusals(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the path in front of the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def naming_refusals(path: Path) -> Iterator[None]:
    """Raise OSError with the path and the space left for what could not be written inside.

    safetensors and torch have errors of their own for it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is None:  # named already, further inside
            raise
        reason = shown(str(getattr(error, "strerror", None) or error))
        there = next(x for x in (path.absolute(), *path.absolute().parents) if x.exists())
        free = shutil.disk_usage(there).free
        raise OSError(f"{path}: cannot be written: {reason} ({free:,} bytes free)") from None


def read_json(path: Path, longest: int = 1 << 28) -> dict:
    """The JSON object in a file of at most so many bytes; ValueError, naming the path, if none."""
    try:
        if path.stat().st_size > longest:
            raise ValueError(f"longer than {longest:,} bytes")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object but {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from None
    return value


def content_of(file: bytes | Path) -> bytes:
    """The content of a file that may be elsewhere still, or nowhere yet."""
    return file.read_bytes() if isinstance(file, Path) else file


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a UTF-8 text that are not blank, each with its place for messages."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            # Not splitlines(): that also cuts at characters that a line may hold, as U+2028.
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def parse_json(where: str, text: str) -> Any:
    """The JSON value in a text; ValueError, with its place, if there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for nesting too deep
        raise ValueError(f"{where}: not JSON ({error})") from None


def check_text(where: str, name: str, value: object) -> str:
    """The value, if it is a text of whole characters and no endless one; else ValueError."""
    if not isinstance(value, str):
        raise ValueError(f'{where}: no text "{name}"')
    if len(value) > LONGEST_TEXT:
        raise ValueError(f'{where}: "{name}" has {len(value):,} characters, above {LONGEST_TEXT:,}')
    if re.search("[\ud800-\udfff]", value):  # JSON can write half a surrogate pair
        raise ValueError(f'{where}: "{name}" holds a character cut in half')
    return value


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object into a file of a folder that is not in use yet."""
    with naming_refusals(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def default_out_dir(path: str | Path, n: int, quantize: str | None = None) -> Path:
    """Where a checkpoint is cut to: beside it, under its name with _fs, n and int8 behind."""
    path = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()
    name = f"{path.name.removesuffix('.gguf')}_fs{n}"
    return path.with_name(f"{name}_{quantize}" if quantize else name)


def load_plain(path: Path) -> dict[str, torch.Tensor]:
    """Load a dict of tensors that torch.save wrote, mapped into memory.

    No code in the file can run, nor ask for memory. Raises ValueError, naming the path, for
    anything else, and for torch's format of before 2020, which cannot be mapped.
    """
    try:
        _check_archive(path)
        content = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: unreadable ({error})") from None
    except Exception as error:  # torch raises whatever the bytes provoke
        reason = shown(str(error) or type(error).__name__)
        raise ValueError(
            f"{path}: not a file of torch.save's present format, or damaged: {reason}; copy it "
            "again, or save it anew with torch.save"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: should be a dict of names and tensors, but is not")
    for name, tensor in content.items():
        # A tensor can claim more elements than it has bytes (stride 0): nothing may be sized by it.
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: damaged: {shown(name)} is no tensor of the bytes it has")
    return content


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive whose mapping would trust too much.

    Each record must lie in the file, stored plain, and its pickle may name nothing but what a dict
    of plain tensors is made of: weights_only=True keeps code from running, but what else it allows
    may ask for any amount of memory, or for tensors without content.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            name = shown(record.filename)
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {name} is compressed")
            if record.header_offset + record.file_size > size:
                raise ValueError(f"record {name} reaches past the end of the file")
    # torch has its own reader of archives, which finds other records than Python's in a crafted
    # one (names in other case, shifted directories). What counts is the pickle that it finds.
    reader = torch._C.PyTorchFileReader(str(path))
    for name in reader.get_all_records():
        if not name.startswith("data/") and reader.get_record_size(name) > LONGEST_PICKLE:
            raise ValueError(f"record {shown(name)} is {reader.get_record_size(name):,} bytes long")
    for opcode, argument, _ in pickletools.genops(reader.get_record("data.pkl")):
        names_something = opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST")
        if names_something and not re.fullmatch(PLAIN, str(argument)):
            raise ValueError(f"it holds more than tensors ({argument}), which could run code")


def hash_of(path: Path, algorithm: str = "sha256") -> str:
    """The hash of a file's bytes, in hexadecimal digits."""
    total = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, row by row, as they lie in a file."""
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def sha256_of(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's bytes, row by row, in hexadecimal digits."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()
