"""Turn a Llama of any format into Meta's format, tokenizer included.

python convert_model.py --from model.gguf --out_dir ckpts/NAME
"""

from llama import cli


def main(from_: str, out_dir: str, n: int = 1, dtype: str | None = None) -> None:
    """Turn a GGUF file, a Hugging Face folder or a folder in Meta's format into Meta's format.

    Args:
        from_: a .gguf file or a folder with one, a Hugging Face folder, or one in Meta's format.
        out_dir: folder to write; it receives the tokenizer too.
        n: how many shards to write.
        dtype: float32, bfloat16 or float16; by default what the source holds (quantised: float32).
    """
    # here and not above, so that --help need not wait for torch
    from llama import parallel
    from llama.checkpoint.convert import open_any
    from llama.checkpoint.weights import parse_dtype, valid_shard_counts
    from llama.checkpoint.write import write_checkpoint

    if parallel.rank():  # one process does it, also where torchrun started several
        return
    wanted = parse_dtype(dtype)
    source = open_any(from_)
    write_checkpoint(source, out_dir, n, wanted)
    counts = ", ".join(map(str, valid_shard_counts(source.args)))
    print(f"{out_dir}: {cli.counted(n, 'shard')}. For N cards, N among {counts}: "
          f"python split_model.py --ckpt_dir {out_dir} --n N")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
