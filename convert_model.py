"""Turn a GGUF file or a Hugging Face folder of a Llama into Meta's format, tokenizer included.

python convert_model.py --from model.gguf --out_dir ckpts/NAME
"""

from llama import parallel
from llama.checkpoint import Checkpoint, counted, parse_dtype
from llama.hf import open_any
from llama.reshard import write_checkpoint


def main(from_: str, out_dir: str, n: int = 1, dtype: str | None = None) -> None:
    """Turn a GGUF file or a Hugging Face folder of a Llama into Meta's format.

    Args:
        from_: a .gguf file, or a folder with config.json and safetensors.
        out_dir: folder to write; it receives the tokenizer too.
        n: how many shards to write.
        dtype: float32, bfloat16 or float16; by default what the source holds (quantised: float32).
    """
    if parallel.rank():  # one process does it, also where torchrun started several
        return
    wanted = parse_dtype(dtype)
    write_checkpoint(open_any(from_), out_dir, n, wanted)
    counts = ", ".join(map(str, Checkpoint(out_dir).args.valid_shard_counts()))
    print(f"{out_dir}: {counted(n, 'shard')}. For N cards, N among {counts}: "
          f"python split_model.py --ckpt_dir {out_dir} --n N")  # fmt: skip


if __name__ == "__main__":
    parallel.run(main)
