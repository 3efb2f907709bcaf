"""Layers in host memory: the same results, two buffers, each layer copied once for its turn."""

import copy
import functools

import programs
import pytest
import torch
from conftest import TOKENIZERS, make_ckpt

import example
import example_ft
import ft_main
from llama.cache import KVCache
from llama.checkpoint.formats import open_any
from llama.generation import load_model
from llama.offload import Offload, bus_speed, layers_to_offload
from llama.options import GenerationOptions, TunedGenerationOptions
from llama.tuning.model import add_soft_prompt, soft_prompt_of
from llama.tuning.options import TuningOptions

CPU, CARD = torch.device("cpu"), torch.device("cuda")
IDS = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))


class Watched(Offload):
    """Remembers what was copied, and into which buffer. A card may copy at once, or late."""

    def __init__(self, layers, late=False):
        self.copied, self.late = [], late
        super().__init__(layers, CPU)

    def _fetch(self, i, buffer):
        self.copied.append((i, buffer))
        if self.late:  # not before somebody waits for it
            self.held[buffer] = i
            self.filled[buffer].wait = functools.partial(super()._fetch, i, buffer)
        else:
            super()._fetch(i, buffer)


class Packed(torch.nn.Module):
    """A matrix in other words: numbers of 8 bits and a scale for each two of a row, as buffers."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("numbers", (weight * 16).to(torch.int8))
        self.register_buffer("scales", torch.rand(len(weight), weight.shape[1] // 2) / 16)

    @property
    def weight(self):
        return self.numbers * self.scales.repeat_interleave(2, 1)


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def models(tmp_path, request):
    """A model of 6 layers, and it again with all but one of them in host memory."""
    model = programs.load(make_ckpt(tmp_path / "ckpt", vocab_size=512, n_kv_heads=2, n_layers=6))
    offloaded = copy.deepcopy(model)
    away = [offloaded.layers[i] for i in (0, 1, 3, 4, 5)]
    return model, offloaded, Watched(away, late=request.param)


@torch.inference_mode()
def generate(model):
    """The states of a prompt and of three tokens behind it."""
    cache = KVCache(model, 2, 16)
    states = [model.hidden_states(IDS, cache=cache)]
    for position in range(12, 15):
        ids = IDS[:, position - 12 : position - 11]
        states.append(model.hidden_states(ids, cache=cache, start_pos=[position] * 2))
    return torch.cat(states, 1)


def tune(model, checkpointing):
    """The loss and the prompt's gradient of two batches, with an evaluation between them."""
    model.gradient_checkpointing = checkpointing
    tuned = add_soft_prompt(model, 4, [7, 8], "ckpt")
    losses = []
    for ids in (IDS[:1], IDS[1:]):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            losses += [loss.detach(), tuned(input_ids=IDS, labels=IDS).loss]
    return torch.stack(losses), soft_prompt_of(tuned).grad


def test_generation_is_the_same_and_a_layer_is_copied_once_a_pass(models):
    model, offloaded, offload = models
    assert torch.equal(generate(offloaded), generate(model))
    # one ahead, into the buffer that the layer before it left, and on from the last to the first
    order = [(n % 5, n % 2) for n in range(4 * 5 + 1)]
    assert offload.copied == order
    assert torch.equal(offloaded(IDS), model(IDS))  # with gradients enabled
    offloaded.to(CPU)
    assert torch.equal(generate(offloaded), generate(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_the_same_and_backward_copies_in_reverse(models, checkpointing):
    model, offloaded, offload = models
    for found, expected in zip(tune(offloaded, checkpointing), tune(model, checkpointing)):
        assert torch.equal(found, expected)
    there, back, again = [0, 1, 2, 3, 4], [2, 1, 0], [2, 3, 4, 0, 1]
    # the two layers at an end are still there when a pass turns round
    assert [i for i, _ in offload.copied][:13] == [*there, *back, *again]


def test_modules_of_several_matrices_and_layers_that_differ_go_the_same_way(tmp_path):
    folder = make_ckpt(tmp_path / "ckpt", vocab_size=512, n_kv_heads=2, n_layers=4)
    model = programs.load(folder)
    for layer in model.layers[1:]:
        layer.feed_forward.w1 = Packed(layer.feed_forward.w1.weight)
    expected = generate(model)
    n_bytes = sum(x.nbytes for x in model.layers.state_dict().values() if x.dim() > 1)
    offload = Watched(model.layers)
    assert n_bytes <= offload.n_bytes < n_bytes * 1.1
    assert not [name for name, x in model.layers.state_dict().items() if x.dim() > 1]
    assert torch.equal(generate(model), expected)


def test_layers_are_spread_and_more_than_there_are_refused():
    assert layers_to_offload(32, 4, CARD) == [7, 15, 23, 31]
    assert layers_to_offload(5, 5, CARD) == [0, 1, 2, 3, 4]
    assert layers_to_offload(5, 0, CARD) == []
    for n in (6, -1):
        with pytest.raises(ValueError, match=f"--offload must be from 0 to .* 5 layers, not {n}"):
            layers_to_offload(5, n, CPU)
    assert bus_speed(CPU, 1 << 16) > 0


def test_on_a_cpu_it_does_nothing_and_says_so(tmp_path, capsys):
    folder = make_ckpt(tmp_path / "ckpt")
    model = load_model(open_any(folder), CPU, offload=2)
    assert "--offload 2: does nothing on a CPU" in capsys.readouterr().err
    assert torch.equal(model(IDS), load_model(open_any(folder), CPU)(IDS))
    assert "offload" not in capsys.readouterr().err


def test_every_script_hands_the_number_on(tmp_path):
    given = {"ckpt_dir": str(make_ckpt(tmp_path / "ckpt")), "offload": 3}
    given["tokenizer_path"] = str(TOKENIZERS["sentencepiece"][0])
    torch.save({"prompt_embeddings": torch.ones(3, 64)}, tmp_path / "prompt.bin")
    calls = {
        example: GenerationOptions(**given),
        example_ft: TunedGenerationOptions(**given, tuning_ckpt_path=str(tmp_path / "prompt.bin")),
        ft_main: TuningOptions(
            **given, dataset_path="datasets/short_answers.json", output_dir=str(tmp_path / "out")
        ),
    }
    for script, flags in calls.items():
        with pytest.raises(ValueError, match="--offload must be from 0 to the model's 2 layers"):
            script.main(flags)
