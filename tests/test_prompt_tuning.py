"""n ranks learn what one learns, and adapters go in and out of PEFT unchanged."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from conftest import REPO, TOKENIZERS, hf_model, make_ckpt, make_params, run_script
from random_model import random_source
from safetensors.torch import load_file, save_file

from llama import LLaMA, parallel
from llama.checkpoint import Checkpoint
from llama.generation import load_model
from llama.prompt_tuning import (
    add_soft_prompt,
    check_options,
    load_soft_prompt,
    newest_checkpoint,
    save_adapter,
    soft_prompt_of,
    warn_of_another_model,
)
from llama.reshard import write_checkpoint

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]
MODEL = {"vocab_size": VOCAB_SIZE, "n_kv_heads": 2}


def train(tmp_path, name, n=None, ckpt="ckpt", **options):
    """Run ft_main.py on a tiny model; returns the result and the output folder."""
    ckpt_dir = tmp_path / f"{ckpt}{n or 1}"
    if not ckpt_dir.exists():
        make_ckpt(ckpt_dir, n=n or 1, **MODEL)
    flags = flags_of(ckpt_dir, tmp_path / name, **options)
    return run_script("ft_main.py", *flags, n=n, timeout=300), tmp_path / name


def flags_of(ckpt_dir, output_dir, **options):
    flags = {
        "ckpt_dir": ckpt_dir,
        "tokenizer_path": PATH,
        "dataset_path": "datasets/short_answers.json",
        "output_dir": output_dir,
        "max_steps": 50,
        "gradient_accumulation_steps": 2,
        "batch_size": 2,
        "max_seq_len": 96,
        "num_virtual_tokens": 8,
        "lr": 1e-3,
        "save_steps": 20,
        "logging_steps": 1,
    } | options
    return [str(part) for key, value in flags.items() for part in (f"--{key}", value)]


def losses(folder, key="loss"):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row[key]) for row in history if key in row]


def prompt_of(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


def test_any_number_of_ranks_learns_the_same_and_leaves_the_shards_alone(tmp_path):
    runs = {}
    for n in (1, 2, 4):
        before = hashes(make_ckpt(tmp_path / f"ckpt{n}", n=n, **MODEL))
        result, folder = train(tmp_path, f"out{n}", n=n, val_set_size=8, eval_steps=25)
        assert result.returncode == 0, result.stderr[-3000:]
        assert hashes(tmp_path / f"ckpt{n}") == before
        assert result.stderr.count("step 25 of 50: loss") == 1  # rank 0 alone speaks
        runs[n] = folder
    one = losses(runs[1]) + losses(runs[1], "eval_loss")
    assert len(losses(runs[1])) == 50
    evaluations = [loss for _, loss in losses(runs[1], "eval_loss")]
    assert evaluations[0] > evaluations[-1]  # before and after
    for n in (2, 4):
        other = losses(runs[n]) + losses(runs[n], "eval_loss")
        assert [step for step, _ in other] == [step for step, _ in one]
        values = [torch.tensor([loss for _, loss in run]) for run in (other, one)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=0)
        torch.testing.assert_close(prompt_of(runs[n]), prompt_of(runs[1]), rtol=0, atol=1e-4)
    for name in ("adapter_config.json", "loss.png", "trainer_state.json", "checkpoint-40"):
        assert (runs[4] / name).exists(), name
    held = {path.name for path in (runs[4] / "checkpoint-40").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= held
    sizes = [path.stat().st_size for path in (runs[4] / "checkpoint-40").iterdir()]
    assert sum(sizes) < 100_000  # no base weights


GRADIENT_CODE = """
import torch
from llama import parallel
from llama.checkpoint import Checkpoint
from llama.reshard import write_checkpoint
from llama.generation import load_model
from llama.prompt_tuning import add_soft_prompt, soft_prompt_of
model = load_model(Checkpoint(ckpt_dir), parallel.setup())
model.gradient_checkpointing = checkpointing
tuned = add_soft_prompt(model, 16, list(range(50, 66)), ckpt_dir)
batch = torch.load(batch_path)
loss = tuned(**batch).loss
loss.backward()
gradient = soft_prompt_of(tuned).grad
everywhere = parallel.gather_objects(gradient.numpy().tobytes())
assert len(set(everywhere)) == 1  # bit-equal between the ranks
if parallel.rank() == 0:
    torch.save({"loss": loss.detach(), "gradient": gradient}, out)
"""


@pytest.mark.parametrize(("n", "checkpointing"), [(1, False), (2, True), (4, False)])
def test_gradient_equals_peft_over_hugging_face(tmp_path, on_ranks, n, checkpointing):
    # std 0.2: at 0.5 Hugging Face's own float32 is 2e-5 away from its float64
    source = random_source(make_params(**MODEL), std=0.2)
    write_checkpoint(source, tmp_path / "ckpt", n)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB_SIZE, (4, 24), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :8] = -100
    mask[1, 18:], labels[1, 18:] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    torch.save(batch, tmp_path / "batch.pth")
    on_ranks(
        n,
        GRADIENT_CODE,
        ckpt_dir=str(tmp_path / "ckpt"),
        batch_path=str(tmp_path / "batch.pth"),
        out=str(tmp_path / "out.pth"),
        checkpointing=checkpointing,
    )
    found = torch.load(tmp_path / "out.pth")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    reference = peft.get_peft_model(hf_model(source), config)
    weight = reference.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(source.read("tok_embeddings.weight")[50:66])
    loss = reference(**batch).loss
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=0)
    assert (found["gradient"] - weight.grad).norm() <= 1e-5 * weight.grad.norm()


def start(tmp_path, out, n):
    """The same run in the background, to be killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    command += ["ft_main.py", *flags_of(tmp_path / f"ckpt{n}", out)]
    return subprocess.Popen(command, cwd=REPO, text=True, stderr=subprocess.PIPE)


def ranks_of(agent):
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def test_a_killed_rank_ends_the_run_and_what_was_saved_resumes(tmp_path):
    whole, reference = train(tmp_path, "whole", n=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    out = tmp_path / "out"
    agent = start(tmp_path, out, 2)
    for line in agent.stderr:
        if line.startswith("step 30 "):  # between the saves of steps 20 and 40
            os.kill(ranks_of(agent)[1], signal.SIGKILL)
            break
    began = time.monotonic()
    message = agent.communicate(timeout=60)[1]
    assert time.monotonic() - began < 30
    assert agent.returncode == 1
    assert message.count("error: another rank ended") == 1
    assert (out / "checkpoint-20").is_dir()
    assert not (out / "adapter_config.json").exists()
    resumed, _ = train(tmp_path, "out", n=2, resume=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    after = [(step, loss) for step, loss in losses(out) if step > 20]
    assert after == [(step, loss) for step, loss in losses(reference) if step > 20]
    assert torch.equal(prompt_of(out), prompt_of(reference))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny model with an adapter that ft_main.py trained."""
    folder = tmp_path_factory.mktemp("tuned")
    result, out = train(folder, "out", max_steps=4, save_steps=2)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, out


def test_our_adapter_gives_our_logits_in_plain_peft(tuned):
    folder, out = tuned
    model = load_model(Checkpoint(folder / "ckpt1"), parallel.setup())
    ids = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    reference = peft.PeftModel.from_pretrained(hf_model(random_source(make_params(**MODEL))), out)
    soft = load_soft_prompt(out, 64)
    with torch.inference_mode():
        embeds = torch.cat((soft.expand(2, -1, -1), model.tok_embeddings(ids)), dim=1)
        logits = model(inputs_embeds=embeds)
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [1, 4])
def test_an_adapter_of_plain_peft_gives_the_same_text_here(tmp_path, n):
    torch.manual_seed(n)
    reference = peft.get_peft_model(
        hf_model(random_source(make_params(**MODEL))),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    )
    prompt = reference.prompt_encoder["default"].embedding.weight
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ckpt_dir = make_ckpt(tmp_path / "ckpt", n=n, **MODEL)
    llama = LLaMA.build(make_ckpt(tmp_path / "one", **MODEL), PATH)
    texts = ["The capital of France is", "Once"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    result = run_script(
        "example_ft.py",
        *("--ckpt_dir", ckpt_dir, "--tokenizer_path", PATH, "--temperature", 0),
        *("--tuning_ckpt_path", tmp_path / "adapter", "--max_gen_len", 12),
        *("--prompts_file", tmp_path / "prompts.txt"),
        n=n,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    embed = reference.get_base_model().get_input_embeddings()
    for text in texts:
        ids = llama.tokenizer.encode(text)
        new = []
        with torch.inference_mode():
            for _ in range(12):
                embeds = torch.cat((prompt, embed(torch.tensor(ids + new))))[None]
                logits = reference.get_base_model()(inputs_embeds=embeds).logits
                new.append(logits[0, -1].argmax().item())
        if 2 in new:
            new = new[: new.index(2)]
        assert f"{text}{llama._text_after(ids, new)}\n" in result.stdout


def test_cached_generation_with_a_prompt_equals_uncached_up_to_the_last_position(tmp_path):
    llama = LLaMA.build(make_ckpt(tmp_path / "ckpt", **MODEL), PATH, max_seq_len=24)
    llama.soft_prompt = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    llama.tokenizer.stop_ids = frozenset()
    prompts = ["Once", "The capital of France is", "a b c d e f g"]
    together = llama.generate(prompts, max_gen_len=99, temperature=0)
    for prompt, output in zip(prompts, together):
        assert llama.generate([prompt], max_gen_len=99, temperature=0) == [output]
        ids = llama.tokenizer.encode(prompt)
        assert 7 + len(ids) + len(output.token) == 24
        sequence = torch.tensor([ids + output.token])
        with torch.inference_mode():
            embeds = torch.cat((llama.soft_prompt[None], llama.model.tok_embeddings(sequence)), 1)
            choices = llama.model(inputs_embeds=embeds)[0].argmax(-1).tolist()
        assert choices[7 + len(ids) - 1 : -1] == output.token


def test_p_tuning_goes_through_the_same_face(tmp_path):
    from llama.prompt_tuning import LlamaForPromptTuning

    model = load_model(Checkpoint(make_ckpt(tmp_path / "ckpt", **MODEL)), parallel.setup())
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    )
    tuned = peft.get_peft_model(LlamaForPromptTuning(model), config)
    ids = torch.arange(1, 13)[None]
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    save_adapter(tuned, tmp_path)
    assert load_soft_prompt(tmp_path, 64).shape == (4, 64)


@pytest.mark.parametrize("key", ["prompt_embeddings", "embedding.weight"])
def test_old_files_are_read(tmp_path, key):
    prompt = torch.randn(3, 64)
    torch.save({key: prompt}, tmp_path / "adapter_model.bin")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        assert torch.equal(load_soft_prompt(path, 64), prompt)
    save_file({key: prompt}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(load_soft_prompt(tmp_path / "adapter_model.safetensors", 64), prompt)


class RunsCode:
    def __reduce__(self):
        return (print, ("this code ran",))


BAD_ADAPTERS = {
    "missing": (lambda f: None, "no such adapter"),
    "empty folder": (lambda f: f.mkdir(), "no adapter_model.safetensors or"),
    "other dim": (lambda f: torch.save({"prompt_embeddings": torch.ones(3, 8)}, f), "dim is 64"),
    "vector": (lambda f: torch.save({"prompt_embeddings": torch.ones(64)}, f), "shape"),
    "other keys": (lambda f: torch.save({"lora_A": torch.ones(3, 64)}, f), "no tuned prompt"),
    "code": (lambda f: torch.save({"prompt_embeddings": RunsCode()}, f), "more than tensors"),
    "memory": (
        lambda f: f.write_bytes(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."),
        "more than tensors .builtins bytearray.",
    ),
    "text": (lambda f: f.write_text("hello"), "not an adapter"),
    "no tensors": (lambda f: torch.save([1, 2], f), "no tuned prompt"),
}


@pytest.mark.parametrize(("make", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_what_is_no_tuned_prompt_is_named(tmp_path, capfd, make, message):
    make(tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_soft_prompt(tmp_path / "adapter", 64)
    assert "this code ran" not in capfd.readouterr().out


def test_a_lora_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="type LORA"):
        load_soft_prompt(tmp_path, 64)


def test_bad_requests_are_one_line_and_leave_a_run_alone(tuned):
    folder, out = tuned
    before = hashes(out / "checkpoint-4")
    other = make_ckpt(folder / "other1", **MODEL, norm_eps=1e-3)
    assert other
    rows = folder / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]')
    cases = [
        ({}, "holds another run"),
        ({"resume": True, "num_virtual_tokens": 9}, "8 virtual tokens, but"),
        ({"resume": True, "ckpt": "other"}, "another model"),
        ({"name": "new", "resume": True}, "no whole checkpoint to resume"),
        ({"name": "new", "dataset_path": folder / "none.json"}, "none.json"),
        ({"name": "new", "dataset_path": rows}, "row 2"),
        ({"name": "new", "max_seq_len": 20}, "no row leaves room"),
        ({"name": "new", "lr": 1e38, "warmup_steps": 0}, "no numbers any more; lower --lr"),
        ({"resume": True, "batch_size": 3, "seed": 1}, "begun with another batch_size, seed"),
    ]

    def attempt(number):
        options = {"name": "out"} | cases[number][0]
        name = f"new{number}" if options.pop("name") == "new" else "out"
        return train(folder, name, **options)[0]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(attempt, range(len(cases))))
    for result, (options, message) in zip(results, cases):
        assert result.returncode == 1, (options, result.stderr)
        assert message in result.stderr.splitlines()[-1], result.stderr
        assert result.stderr.count("error: ") == 1
        assert "Traceback" not in result.stderr
    assert hashes(out / "checkpoint-4") == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_virtual_tokens", 96, "leave room in --max_seq_len 96"),
        ("num_virtual_tokens", 0, "at least 1"),
        ("num_epochs", 0.0, "above 0"),
        ("num_epochs", float("nan"), "above 0"),
        ("max_steps", 0, "at least 1, or -1"),
        ("batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", -1, "at least 1"),
        ("lr", -1.0, "above 0"),
        ("lr", float("inf"), "above 0"),
        ("lr_scheduler", "wavy", "one of cosine, linear"),
        ("warmup_steps", -1, "at least 0"),
        ("max_grad_norm", -1.0, "at least 0"),
        ("eval_steps", 0, "at least 1"),
        ("save_steps", 0, "at least 1"),
        ("logging_steps", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "below"),
    ],
)
def test_options_that_train_nothing_are_named(name, value, message):
    options = {"num_virtual_tokens": 8, "num_epochs": 1.0, "max_steps": -1, "batch_size": 2}
    options |= {"gradient_accumulation_steps": 1, "lr": 1e-3, "lr_scheduler": "cosine"}
    options |= {"warmup_steps": 0, "max_grad_norm": 1.0, "eval_steps": 1, "save_steps": 1}
    options |= {"logging_steps": 1, "seed": 0, "max_seq_len": 96}
    check_options(options)
    with pytest.raises(ValueError, match=rf"--{name}\b.*{message}"):
        check_options(options | {name: value})


def spoil(name, content):
    return lambda folder: (folder / name).write_bytes(content(folder / name))


class RunsSystem:
    def __reduce__(self):
        return (os.system, ("touch this_code_ran",))


def pickled(path):
    torch.save(RunsSystem(), path)
    return path.read_bytes()


DAMAGE = {
    "optimizer cut": (
        spoil("optimizer.pt", lambda p: p.read_bytes()[:100]),
        "optimizer.pt: damaged",
    ),
    "rng cut": (spoil("rng_state.pth", lambda p: b""), "rng_state.pth: damaged"),
    "state cut": (spoil("trainer_state.json", lambda p: b"{"), "trainer_state.json: unreadable"),
    "optimizer runs code": (spoil("optimizer.pt", pickled), "optimizer.pt: damaged"),
    "scheduler runs code": (spoil("scheduler.pt", pickled), "scheduler.pt: damaged"),
    "rng runs code": (spoil("rng_state.pth", pickled), "rng_state.pth: damaged"),
    "incomplete": (lambda f: (f / "optimizer.pt").unlink(), None),
    "adapter gone": (lambda f: (f / "adapter_model.safetensors").unlink(), None),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_incomplete_one_passed_over(
    tuned, tmp_path, monkeypatch, damage, message
):
    out = tmp_path / "out"
    shutil.copytree(tuned[1], out)
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-9-bak").mkdir()
    assert newest_checkpoint(out) == out / "checkpoint-4"
    monkeypatch.chdir(tmp_path)
    damage(out / "checkpoint-4")
    if message is None:
        assert newest_checkpoint(out) == out / "checkpoint-2"
    else:
        with pytest.raises(ValueError, match=message):
            newest_checkpoint(out)
    assert not (tmp_path / "this_code_ran").exists()


def test_a_finished_run_resumes_to_what_it_was_and_can_be_extended(tuned, tmp_path):
    folder, out = tuned
    shutil.copytree(out, folder / "again")
    (folder / "again" / "adapter_model.safetensors").unlink()
    result, again = train(folder, "again", max_steps=4, save_steps=1, resume=True)
    assert result.returncode == 0, result.stderr
    assert torch.equal(prompt_of(again), prompt_of(out))
    assert losses(again) == losses(out)
    result, again = train(folder, "again", max_steps=6, save_steps=1, resume=True)
    assert result.returncode == 0, result.stderr
    assert [step for step, _ in losses(again)] == [1, 2, 3, 4, 5, 6]
    assert (again / "checkpoint-5").is_dir()  # as asked now, not as the first run was


def test_a_run_that_came_to_nothing_leaves_its_folder_usable(tmp_path):
    failed, out = train(tmp_path, "out", val_set_size=1000)
    assert "--val_set_size 1000 cannot be taken out of" in failed.stderr
    result, _ = train(tmp_path, "out", max_steps=1)
    assert result.returncode == 0, result.stderr
    assert (out / "adapter_config.json").is_file()


def test_epochs_with_evaluation_resume_bit_equal(tmp_path):
    options = {"max_steps": -1, "num_epochs": 2.0, "gradient_accumulation_steps": 4}
    options |= {"batch_size": 8, "val_set_size": 7, "eval_steps": 3, "save_steps": 4}
    whole, reference = train(tmp_path, "whole", **options)
    assert whole.returncode == 0, whole.stderr
    assert losses(reference)[-1][0] == 14  # 200 rows are 7 steps a pass
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(reference / "checkpoint-8", out / "checkpoint-8")
    resumed, _ = train(tmp_path, "out", resume=True, **options)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(out) == losses(reference)
    evaluations = [{row[0]: row[1] for row in losses(f, "eval_loss")} for f in (out, reference)]
    assert evaluations[0].items() >= evaluations[1].items()
    assert torch.equal(prompt_of(out), prompt_of(reference))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_gradients_through_a_half_precision_model_keep_their_size(tmp_path, dtype, tolerance, size):
    source = random_source(make_params(**MODEL), std=0.2)
    write_checkpoint(source, tmp_path / "ckpt")
    ids = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))
    gradients = []
    for wanted in (torch.float32, dtype):
        model = load_model(Checkpoint(tmp_path / "ckpt"), parallel.setup(), wanted)
        tuned = add_soft_prompt(model, 16, list(range(50, 66)), "ckpt")
        # As in long batches, where each token has a small part in the mean.
        loss = tuned(input_ids=ids, labels=ids, num_items_in_batch=46 / size).loss
        loss.backward()
        gradients.append(soft_prompt_of(tuned).grad)
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() <= tolerance * gradients[0].norm()


def test_an_adapter_of_another_model_is_used_with_a_warning(tuned, capsys):
    folder, out = tuned
    other = make_ckpt(folder / "other_norm", **MODEL, norm_eps=1e-2)
    warn_of_another_model(out, load_model(Checkpoint(folder / "ckpt1"), parallel.setup()))
    assert capsys.readouterr().err == ""
    warn_of_another_model(out, load_model(Checkpoint(other), parallel.setup()))
    assert "trained on another model (it differs in norm_eps)" in capsys.readouterr().err


def test_text_starts_the_prompt_as_its_embeddings(tmp_path):
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", **MODEL))
    model = load_model(ckpt, parallel.setup())
    prompt = soft_prompt_of(add_soft_prompt(model, 5, [7, 8], "ckpt"))
    expected = ckpt.read("tok_embeddings.weight")[[7, 8, 7, 8, 7]]
    assert torch.equal(prompt.detach(), expected)
    assert prompt.dtype == torch.float32
