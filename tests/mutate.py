"""Mutate one file of a checkpoint folder many times: it must be an error or be read rightly.

python tests/mutate.py FOLDER params.json|manifest.json|shard|verified COUNT
Start reading at main().
"""

import json
import random
import resource
import signal
import sys
from pathlib import Path

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.write import tensor_ranges

ADDRESS_SPACE = 1 << 30  # bytes above what importing torch has mapped
VALUES = [0, -1, 1, 2**31, 2**63, 1e300, "64", None, True, [], {}, [[[]]], 4, 8, 63, 0.5]


def forbid_code(event: str, args: tuple) -> None:
    """Stop at what code out of a file would have to do."""
    assert event not in ("os.system", "subprocess.Popen", "os.exec", "socket.connect"), event


def mutate_json(content: bytes, choose: random.Random) -> bytes:
    """Put odd values at random places of a JSON object, at random depths."""
    value = json.loads(content)
    for _ in range(choose.randint(1, 3)):
        table = value
        while choose.random() < 0.7:
            inner = [x for x in table.values() if isinstance(x, dict) and x]
            table = choose.choice(inner) if inner else table
        table[choose.choice(list(table))] = choose.choice(VALUES)
    return json.dumps(value).encode()


def mutate_bytes(content: bytes, places: list[int], choose: random.Random) -> bytes:
    """Change some bytes at these places, and now and then cut the rest off."""
    data = bytearray(content)
    for _ in range(choose.randint(1, 4)):
        place = choose.choice(places)
        data[place] = choose.choice((choose.randrange(256), data[place] ^ 1 << choose.randrange(8)))
    if choose.random() < 0.1:
        del data[choose.choice(places) :]
    return bytes(data)


def main(folder: Path, kind: str, count: int) -> None:
    """Try count mutations; more than half must be errors."""
    sys.addaudithook(forbid_code)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)
    whole = Checkpoint(folder)
    right = {name: whole.read(name).clone() for name in whole.shapes}
    is_json = kind.endswith(".json")
    target = folder / (kind if is_json else "fs_consolidated.01.pth")
    content = target.read_bytes()
    places = list(range(len(content)))
    if not is_json:  # only around the weights
        held = tensor_ranges(target)
        places = [i for i in places if not any(a <= i < b for a, b in held)]
    errors = 0
    for seed in range(count):
        signal.alarm(20)
        choose = random.Random(seed)
        as_json = is_json and choose.random() < 0.5
        new = mutate_json(content, choose) if as_json else mutate_bytes(content, places, choose)
        target.write_bytes(new)
        try:
            found = Checkpoint(folder)
            if kind == "verified":
                found.verify()
            weights = {name: found.read(name) for name in found.shapes}
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), (seed, error)  # noqa: PT017 - not all are errors
            errors += 1
            continue
        except BaseException:
            print("seed", seed, file=sys.stderr)
            raise
        # Without a manifest only what the bytes say can be read, but in this model's shapes.
        for name, weight in weights.items():
            assert weight.shape == found.shapes[name], (seed, name)
            if kind in ("verified", "manifest.json"):
                assert (weight == right[name]).all(), (seed, name)
    target.write_bytes(content)
    assert errors > count / 2, errors


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
