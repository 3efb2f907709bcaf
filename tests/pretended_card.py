"""A card that is not there, and one rank of a run that works on it: for check_cuda.py.

Tensors are FakeTensors (shape, dtype, device, no content), collectives go to torch's "fake" process
group, and a dispatch mode watches every operation. Start reading at pretended().

The card is a PrivateUse1 device named "pretend", as torch's own Python backend makes one: a CPU
build of torch refuses "cuda" as soon as a tensor is indexed. What asks torch.cuda (parallel.py) is
answered by a Driver.
"""

import contextlib
import os
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # which take FakeTensors
import torch.nn.functional as F
import torch.testing._internal.distributed.fake_pg  # the process group "fake"
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import llama
from llama import parallel

aten, _has_kernel = torch.ops.aten, torch._C._dispatch_has_kernel_for_dispatch_key
_LIBRARY = torch.library.Library("aten", "IMPL")
TOKEN = 7  # what is chosen while a Watcher is told no other
NCCL_DTYPES = {
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
BLOCK = 512  # bytes of which torch's allocator gives out multiples
CODE = (f"{Path(llama.__file__).parent}/", "/fairscale/", "/peft/")  # that is named as a place


def _register_card() -> torch.device:
    """Make torch know a device "pretend:0", which is there but cannot be initialised."""
    module = types.ModuleType("torch.pretend")
    module.is_available = lambda: False  # so that FakeTensorMode leaves the device alone
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.is_initialized = lambda: False
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.float16]  # torch.utils.checkpoint asks
    for name in ("Stream", "Event", "stream", "current_stream"):  # which do nothing
        setattr(module, name, getattr(torch.cpu, name))
    backend_registration._setup_privateuseone_for_python_backend("pretend", module)
    # One kernel on a card; on a device that has none torch makes it of several.
    _LIBRARY.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "PrivateUse1")
    return torch.device("pretend", 0)


CARD = _register_card()


class CardGenerator(torch.Generator):
    """Random numbers that say they are the card's."""

    device = CARD

    def __new__(cls, device: torch.device) -> "CardGenerator":
        assert device == CARD, f"a generator on {device}"
        return super().__new__(cls)


def place_of(func: torch._ops.OpOverload) -> str:
    """The innermost line of the project, or of fairscale or PEFT, that led to an operation."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(folder in name for folder in CODE):
            return f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return f"({func._schema.name.removeprefix('aten::')})"


class Ledger:
    """The bytes that live on the card, by the place that allocated them, and their peak."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.by_place: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        # of each storage: size, place, and a number of its own
        self.sizes: dict[int, tuple[int, str, int]] = {}
        self.n_allocated = 0

    def add(self, tensor: torch.Tensor, func: torch._ops.OpOverload) -> None:
        """Count a tensor's memory until it is freed, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            size, place = -(-storage.nbytes() // BLOCK) * BLOCK, place_of(func)
            self.n_allocated += 1
            self.sizes[key] = size, place, self.n_allocated
            self.live += size
            self.by_place[place] += size
            self.note_peak()
            weakref.finalize(storage, self._free, key)

    def number_of(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's memory, which no other has had."""
        return self.sizes[tensor.untyped_storage()._cdata][2]

    def _free(self, key: int) -> None:
        size, place, _ = self.sizes.pop(key)
        self.live -= size
        self.by_place[place] -= size

    def note_peak(self, **more: int) -> None:
        """Note what lives now, and more that lives for a moment, if that is the most so far."""
        size = self.live + sum(more.values())
        if size > self.peak:
            self.peak, self.at_peak = size, self.by_place + Counter(more)

    def restart(self) -> None:
        """Forget the peak, and by what was allocated all that lives now."""
        self.by_place.clear()
        self.peak, self.at_peak = self.live, Counter()


class Watcher(TorchDispatchMode):
    """Watches every operation of a rank: devices, nccl's rules, what waits for the card, memory."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.tokens: list[int] = []  # what the next numbers are that are read from the card
        self.padded_left = False  # what any() of a padding is
        self.restart()

    def restart(self) -> None:
        """Begin anew to count."""
        self.collectives: list[tuple] = []  # name, shapes and dtypes, root: alike on all ranks
        self.waits: Counter[tuple[str, str]] = Counter()  # of the host for the card: what, where
        self.off_card: Counter[tuple[str, str]] = Counter()  # computed on the CPU: what, where
        self.kernels: Counter[str] = Counter()  # of attention
        self.masks: Counter[int] = Counter()  # how often attention took each
        self.last: object = None  # operation
        self.ledger.restart()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # inference_mode hands on operations that consist of others
        if func.namespace == "aten" and not _has_kernel(func.name(), "CPU"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        before, self.last = self.last, func
        if func is aten._local_scalar_dense.default:
            return self._read(args[0], before)
        if func.namespace == "c10d":
            self._check_nccl(func, args)
        if func is aten.index.Tensor and (masks := [i for i in args[1] if _is_mask(i)]):
            return self._all_of(args[0], masks[0], func)
        self._check_transfer(func, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.device == CARD:
                self.ledger.add(tensor, func)
            elif isinstance(tensor, torch.Tensor) and not _is_input(func, tensor):
                self.off_card[func._schema.name, place_of(func)] += 1
        return result

    def _read(self, scalar: torch.Tensor, before: object) -> float:
        """Give the host a number; of a list that it reads, it waits for the first."""
        if scalar.device == CARD and before is not aten._local_scalar_dense.default:
            self.waits["read", place_of(aten._local_scalar_dense.default)] += 1
        if before is aten.all.default:  # whether numbers are as they should be
            return True
        if before is aten.any.default:
            return self.padded_left
        return self.tokens.pop(0) if self.tokens else TOKEN

    def _check_nccl(self, func: torch._ops.OpOverload, args: tuple) -> None:
        given = tree_flatten(args)[0]
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if func is torch.ops.c10d.barrier.default:  # its tensor is torch's own
            tensors = []
        for tensor in tensors:
            where = f"{func} at {place_of(func)}"
            if tensor.device != CARD:
                raise RuntimeError(f"nccl: {where} is given a tensor on {tensor.device}")
            if not tensor.is_contiguous():
                raise RuntimeError(f"nccl: {where} is given a tensor that is not contiguous")
            if tensor.dtype not in NCCL_DTYPES:
                raise RuntimeError(f"nccl: {where} is given {tensor.dtype}")
        numbers = [x for x in given if isinstance(x, int)]  # such as the root
        shapes = [(tuple(x.shape), x.dtype) for x in tensors]
        self.collectives.append((func._schema.name, *shapes, *numbers))
        if func is torch.ops.c10d.allgather_.default:  # nccl gathers into one flat buffer first
            size = sum(x.nbytes for x in tree_flatten(args[0])[0])
            self.ledger.note_peak(**{f"flat buffer of all_gather, {place_of(func)}": size})

    def _check_transfer(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        """Count what makes the host wait for the card."""
        if func.overloadpacket in (aten.index, aten.index_put_, aten._index_put_impl_):
            # A card takes indices from the CPU, and waits for them.
            if any(i is not None and i.device != args[0].device for i in args[1]):
                self.waits["index", place_of(func)] += 1
            values = args[2].numel() if len(args) > 2 else 1
            if values > 1 and any(_is_mask(i) for i in args[1]):  # of one value it makes a where
                self.waits["count", place_of(func)] += 1
        elif func in (aten._to_copy.default, aten.copy_.default):
            source = args[1 if func is aten.copy_.default else 0].device
            target = torch.device(kwargs.get("device") or args[0].device)
            at_once = not (kwargs.get("non_blocking") or True in args[2:])
            if source != target and at_once:
                way = "to the card" if target == CARD else "from the card"
                self.waits[way, place_of(func)] += 1

    def _all_of(
        self, x: torch.Tensor, mask: torch.Tensor, func: torch._ops.OpOverload
    ) -> torch.Tensor:
        """x[mask] as if every element of the mask were true."""
        if mask.device not in (x.device, torch.device("cpu")):
            raise RuntimeError(f"index on {mask.device} into a tensor on {x.device}")
        self.waits["count", place_of(func)] += 1
        result = x.new_empty((mask.numel(), *x.shape[mask.dim() :]))
        self.ledger.add(result, func)
        return result

    def attention(
        self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """What F.scaled_dot_product_attention of torch 2.13 does on cards since Ampere.

        flash: half precision, no mask. efficient: any mask, but no grouped heads. math: the rest.
        """
        half = q.dtype in (torch.float16, torch.bfloat16)
        if attn_mask is not None:
            self.masks[self.ledger.number_of(attn_mask)] += 1
        if attn_mask is None and half and (not is_causal or q.shape[2] == k.shape[2]):
            self.kernels["flash"] += 1
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        if not enable_gqa:
            self.kernels["efficient"] += 1
            bias, grad = attn_mask, q.requires_grad or k.requires_grad
            if bias is not None:
                bias = _as_scores_take_it(bias, q.dtype).expand(*q.shape[:3], k.shape[2])
            return aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, grad, dropout_p, is_causal
            )[0]
        self.kernels["math"] += 1
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).float() for x in (k, v))
        scores = q.float() @ k.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores + attn_mask
        return (scores.softmax(-1) @ v).to(q.dtype)


def _as_scores_take_it(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the efficient kernel adds to scores: for booleans or unaligned rows another mask."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf).to(dtype)
    if any(stride % 16 for stride in mask.stride()[:-1]):
        mask = F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
    return mask


def _is_input(func: torch._ops.OpOverload, tensor: torch.Tensor) -> bool:
    """Whether a tensor on the CPU is a number, or what Python made a list into."""
    return tensor.dim() == 0 or func is aten.lift_fresh.default or func.is_view


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class FusedRmsNorm(torch.autograd.Function):
    """What F.rms_norm holds on a card, where it is one kernel; elsewhere it is several."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(ctx.saved_tensors[0]), None


def rms_norm(x, shape, weight=None, eps=None):
    """F.rms_norm on a card; the real one refuses what is on another device."""
    if weight is not None and {x.device, weight.device} == {CARD} and x.dtype == weight.dtype:
        return FusedRmsNorm.apply(x, weight)
    return aten.rms_norm(x, shape, weight, eps)


class Driver:
    """What the driver of some cards says; their UUIDs are GPU-0, GPU-1 …"""

    def __init__(self, cards: int, fault: str = "") -> None:
        self.cards, self.fault = cards, fault
        self.seen: int | None = None
        self.in_use: int | None = None

    def count(self) -> int:
        """The cards that CUDA_VISIBLE_DEVICES leaves, which is read the first time alone."""
        if self.fault:
            raise RuntimeError(self.fault)
        self.seen = torch.cuda._device_count_nvml() if self.seen is None else self.seen
        return self.seen

    def use(self, card: int | torch.device) -> None:
        """Work on a card from now on."""
        index = card if isinstance(card, int) else card.index
        if not 0 <= index < self.count():
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        self.in_use, torch.cuda._initialized = index, True

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        """Have torch.cuda ask this driver."""
        uuids = [f"GPU-{i}" for i in range(self.cards)]
        patch.setattr(torch._C, "_cuda_getDeviceCount", self.count, raising=False)
        patch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: self.cards)
        patch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: uuids)
        patch.setattr(torch.cuda, "set_device", self.use)
        patch.setattr(torch.cuda, "_initialized", False)
        patch.setattr(torch.cuda, "_cached_device_count", None)


@contextlib.contextmanager
def rank_of_run(
    rank: int,
    world: int,
    driver: Driver,
    read_before: bool = False,
    others: str = "a card (another)",
    tensor_parallel: int | None = None,
    **variables: object,
) -> Iterator[types.SimpleNamespace]:
    """Run parallel.setup() as a rank; yields its device and what the process group was told.

    read_before: some library has asked the driver. others: what the other ranks found. variables:
    of the environment, beside or in place of those that torchrun gives the ranks of one machine.
    """
    found, store, init = types.SimpleNamespace(), dist.HashStore(), dist.init_process_group
    for other in range(world):
        store.set(f"llama/found/{other}", others)

    def init_fake(backend: str, *, device_id: torch.device | None, **group: object) -> None:
        found.backend, found.bound_to, found.timeout = backend, device_id, group["timeout"]
        found.card_in_use = driver.in_use
        init("fake", **group)

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if world > 1 else ()
    torchrun = dict(zip(names, map(str, (rank, world, rank, world))))
    with mock.patch.dict(os.environ), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "rendezvous", lambda url: iter([(store, rank, world)]))
        patch.setattr(dist, "init_process_group", init_fake)
        patch.setattr(sys, "excepthook", sys.excepthook)  # which torch replaces
        patch.setattr(parallel, "_device", None)
        patch.setattr(parallel, "_store", None)
        driver.put_in(patch)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.update(torchrun | {name: str(value) for name, value in variables.items()})
        if read_before:
            driver.count()
        try:
            found.device = parallel.setup(tensor_parallel)
            found.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            yield found
        finally:
            parallel.leave()


@contextlib.contextmanager
def pretended(rank: int, world: int, tensor_parallel: int | None = None) -> Iterator[Watcher]:
    """Work as a rank whose tensors are fake and whose card is CARD; yields what watches it."""
    watcher = Watcher()
    run = rank_of_run(rank, world, Driver(world), tensor_parallel=tensor_parallel)
    with run, pytest.MonkeyPatch.context() as patch:
        wait = lambda device: watcher.waits.update({("all", "parallel.now"): 1})  # noqa: E731
        patch.setattr(torch.cuda, "synchronize", wait)
        # FakeTensorMode would believe in the cards
        patch.delattr(torch._C, "_cuda_getDeviceCount")
        patch.setattr(torch.cuda, "_initialized", False)
        patch.setattr(F, "scaled_dot_product_attention", watcher.attention)
        patch.setattr(F, "rms_norm", rms_norm)
        patch.setattr(torch, "Generator", CardGenerator)
        # module.to() swaps fake tensors, and refuses those that FakeTensorMode holds weakly
        nobody = types.SimpleNamespace(getweakrefs=lambda tensor: [])
        patch.setattr(torch.utils, "weakref", nobody, raising=False)
        with FakeTensorMode(allow_non_fake_inputs=True), watcher:
            yield watcher
