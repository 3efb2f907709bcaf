"""The scripts as a user runs them: results on stdout, one clear message for a mistake."""

from conftest import TOKENIZERS, flags_of, make_ckpt, run_script

from llama import LLaMA
from llama.prompts import SEPARATOR

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]


def test_one_and_two_ranks_give_the_text_of_the_whole_model_from_two_shards(tmp_path):
    """That four do, and from other numbers of shards, is in test_ranks.py."""
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=VOCAB_SIZE, n_kv_heads=2)
    split = run_script("split_model.py", "--ckpt_dir", ckpt_dir, "--n", 2)
    assert split.returncode == 0, split.stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe capital of France\n")
    flags = flags_of(tokenizer_path=PATH, prompts_file=prompts, temperature=0, max_gen_len=8)
    texts = prompts.read_text().splitlines()
    outputs = LLaMA.build(ckpt_dir, PATH).generate(texts, max_gen_len=8, temperature=0)
    expected = [text + output.text + SEPARATOR for text, output in zip(texts, outputs)]
    advice = f"python split_model.py --ckpt_dir {ckpt_dir}_fs2 --n 1"
    for n, how_often in ((2, 0), (None, 1)):
        result = run_script("example.py", "--ckpt_dir", f"{ckpt_dir}_fs2", *flags, n=n)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "".join(expected)
        assert "tokens, " in result.stderr
        assert result.stderr.count("2 shards, cut for 1 rank while loading") == how_often
        assert result.stderr.count(advice) == how_often


def test_an_invalid_number_of_ranks_is_said_once_with_the_valid_ones(tmp_path):
    sizes = {"vocab_size": VOCAB_SIZE, "n_heads": 5, "dim": 80, "multiple_of": 80}
    ckpt_dir = make_ckpt(tmp_path / "ckpt", **sizes)
    result = run_script("example.py", "--ckpt_dir", ckpt_dir, "--tokenizer_path", PATH, n=2)
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "with 2 ranks running, it does not cut into 2 shards" in result.stderr
    assert "Valid n: 1, 5" in result.stderr
    assert result.stdout == ""
