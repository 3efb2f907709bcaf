"""The prompts that the example scripts read, and what is said of a file that has none."""

import pytest

from llama.prompts import read_prompts


def test_without_a_file_the_six_known_prompts_run():
    prompts = read_prompts(None)
    assert len(prompts) == 6
    assert prompts[0] == "I believe the meaning of life is"


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "\ufeffone\r\n\n  two\x0bwords\u2028here\n", ["one", "  two\x0bwords\u2028here"]),
        ("p.jsonl", '{"prompt": "a\\nb"}\n\n"c"\n', ["a\nb", "c"]),
    ],
)
def test_a_file_has_a_prompt_a_line(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "no prompts in it"),
        ("p.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("p.jsonl", b'"fine"\n{"prompt":', "line 2: not JSON"),
        ("p.jsonl", b'{"text": "x"}', 'line 1: no text "prompt"'),
        ("p.jsonl", b"7", 'line 1: no text "prompt"'),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path, name, content, message):
    with pytest.raises(FileNotFoundError, match="no such prompts file"):
        read_prompts(str(tmp_path / name))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))
