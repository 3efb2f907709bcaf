"""Start each script up to parallel.setup(), and print what asked for cards before it.

To be run by itself: in a process that has asked already, or imported more, it would tell nothing.
Also printed: what was imported by then that may ask, whether or not it does on this machine.
"""

import json
import sys
import traceback

import torch

MAY_ASK = {"transformers", "peft", "accelerate", "bitsandbytes", "datasets"}
OPTIONS = {"ckpt_dir": "nowhere", "tokenizer_path": "nowhere"}
asked: list[str] = []


def note(what: str) -> int:
    """Note who asked for cards; there are none."""
    callers = [line for line in traceback.format_stack() if "importlib" not in line]
    asked.append(f"{what}\n{''.join(callers[-6:-1])}")
    return 0


def note_library(event: str, args: tuple) -> None:
    """Note who loads a library of the driver's, as ctypes does it."""
    if event == "ctypes.dlopen" and any(x in str(args[0]) for x in ("cuda", "nvidia", "cudart")):
        note(f"loads {args[0]}")


def stop(*_: object) -> None:
    """Take the place of parallel.setup()."""
    raise ValueError("setup")


# With these there, torch takes itself for one with CUDA.
torch._C._cuda_getDeviceCount = lambda: note("counts cards")
torch._C._cuda_init = lambda: note("initialises CUDA")
sys.addaudithook(note_library)

import example  # noqa: E402
import example_ft  # noqa: E402
import ft_main  # noqa: E402
from llama import parallel  # noqa: E402
from llama.options import GenerationOptions, TunedGenerationOptions  # noqa: E402
from llama.tuning.options import TuningOptions  # noqa: E402

parallel.setup = stop
for script, flags in (
    (example, GenerationOptions(**OPTIONS)),
    (example_ft, TunedGenerationOptions(**OPTIONS, tuning_ckpt_path="nowhere")),
    (ft_main, TuningOptions(**OPTIONS, dataset_path="nowhere", output_dir=sys.argv[1])),
):
    try:
        script.main(flags)
        raise RuntimeError(f"{script.__name__} went on without setup()")
    except ValueError as error:
        if str(error) != "setup":
            raise
print(json.dumps({"asked": asked, "imported": sorted(MAY_ASK & sys.modules.keys())}))
