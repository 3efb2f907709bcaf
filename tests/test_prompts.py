"""The prompts that the example scripts read, and what is said of a file that has none."""

import json

import pytest

from llama.prompts import read_prompts


def test_without_a_file_the_six_known_prompts_run():
    prompts = read_prompts(None)
    assert len(prompts) == 6
    assert prompts[0] == "I believe the meaning of life is"


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\r\n\n  two\x0bwords\u2028here\n", encoding="utf-8", newline="")
    assert read_prompts(str(path)) == ["one", "  two\x0bwords\u2028here"]


def test_json_lines_may_hold_line_breaks(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\nb"}) + "\n\n" + json.dumps("c") + "\n")
    assert read_prompts(str(path)) == ["a\nb", "c"]


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
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such prompts file"):
        read_prompts(str(tmp_path / "none.txt"))
