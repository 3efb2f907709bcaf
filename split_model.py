"""Cut a checkpoint in Meta's format into n shards, one a rank.

python split_model.py --ckpt_dir ckpts/7B --n 4
"""

from llama import parallel
from llama.checkpoint import Checkpoint, parse_dtype, write_checkpoint


def main(ckpt_dir: str, n: int, out_dir: str | None = None, dtype: str | None = None) -> None:
    """Cut a checkpoint of any number of shards into n, in a new folder.

    Args:
        ckpt_dir: folder with params.json and consolidated.*.pth or fs_consolidated.*.pth.
        n: how many shards to write; 1 merges.
        out_dir: folder to write, by default the name of ckpt_dir with _fs and n behind it.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds.
    """
    if parallel.rank():  # one process does it, also where torchrun started several
        return
    wanted = parse_dtype(dtype)
    out_dir = out_dir or f"{ckpt_dir.rstrip('/')}_fs{n}"
    write_checkpoint(Checkpoint(ckpt_dir).source(), out_dir, n, wanted)
    print(f"{out_dir}: {n} shards. Generate: torchrun --nproc_per_node {n} example.py "
          f"--ckpt_dir {out_dir} --tokenizer_path …")  # fmt: skip


if __name__ == "__main__":
    parallel.run(main)
