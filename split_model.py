"""Cut a checkpoint of any format into n shards, one a rank; or check that it is whole.

python split_model.py --ckpt_dir ckpts/7B --n 4
python split_model.py --ckpt_dir ckpts/7B_fs4 --verify
"""

from pathlib import Path

from llama import cli


def main(
    ckpt_dir: str,
    n: int | None = None,
    out_dir: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    max_seq_len: int = 512,
    max_batch_size: int = 32,
) -> None:
    """Cut a checkpoint of any number of shards into n, in a new folder; or check that it is whole.

    Args:
        ckpt_dir: a folder in Meta's format (params.json and consolidated.*.pth or
            fs_consolidated.*.pth), a Hugging Face folder, or a .gguf file.
        n: how many shards to write; 1 merges.
        out_dir: folder to write, by default the name of ckpt_dir with _fs and n behind it.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds (quantised:
            float32).
        quantize: int8 or int4: write the matrices in 8 or 4 bits; the scripts read such a folder.
        verify: read everything again and check it: what was cut against ckpt_dir, or without n
            ckpt_dir alone, or ckpt_dir against out_dir.
        dry_run: write nothing, but show what would be written and what memory each rank needs.
        max_seq_len: tokens of a row, in what dry_run says that generation and tuning need.
        max_batch_size: rows at once, in the same.
    """
    # here and not above, so that --help need not wait for torch
    from llama import parallel
    from llama.checkpoint.folder import Checkpoint, compare
    from llama.checkpoint.formats import open_any
    from llama.checkpoint.quantized import quantized
    from llama.checkpoint.weights import parse_dtype
    from llama.checkpoint.write import write_checkpoint
    from llama.files import default_out_dir
    from llama.memory import table

    if parallel.rank():  # one process does it, also where torchrun started several
        return
    if n is None and not verify:
        raise ValueError("--n is needed: how many shards to write (or --verify, to check a folder)")
    if verify and dry_run:
        raise ValueError("--verify reads everything, and --dry_run nothing: give one of them")
    cli.check_at_least(1, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    wanted = parse_dtype(dtype)
    ckpt = quantized(open_any(ckpt_dir), quantize)
    if n is not None and wanted is None and (growth := ckpt.growth(ckpt.shapes)):
        cli.say(f"{ckpt_dir}: {growth}")
    if dry_run and n is not None:
        print(table(ckpt, n, wanted, max_seq_len, max_batch_size))
        return
    if n is not None:
        out_dir = out_dir or str(default_out_dir(ckpt_dir, n, quantize))
        if Path(ckpt_dir).resolve() in Path(out_dir).resolve().parents:
            raise ValueError(f"{out_dir}: inside {ckpt_dir}, which is not to be touched")
        ckpt.check_cut(n, ckpt_dir)
        write_checkpoint(ckpt, out_dir, n, wanted)
        without = " --tokenizer_path …" * (not ckpt.has_tokenizer)
        print(f"{out_dir}: {cli.counted(n, 'shard')}. Generate: torchrun --nproc_per_node {n} "
              f"example.py --ckpt_dir {out_dir}{without}")  # fmt: skip
    if not verify:
        return
    if out_dir is None:
        ckpt.verify()
        print(f"{ckpt_dir}: {ckpt.what_was_verified()}")
    else:
        out = Checkpoint(out_dir)
        compare(ckpt, out)
        converted = f", the second in {out.dtype} as made from {ckpt.dtype}"
        print(f"{ckpt_dir} and {out_dir}: the same model, whole, cut in {ckpt.n} and {out.n}"
              + converted * (out.dtypes != ckpt.dtypes))  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
