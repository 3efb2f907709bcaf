"""Ways to damage a file: each makes of its bytes others, drawn by a seeded random.Random.

flip() and flip_front() know nothing of the content, the others one format each; any_way() picks.
"""

import copy
import io
import itertools
import json
import math
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable

import safetensors.torch
import torch
from torch.utils._pytree import tree_map_only

# What JSON values, numbers in headers and flags are replaced by.
TEXTS = [
    "",
    "64",
    "\x1b[31m\nline",
    "\ud800",
    "../../x",
    "a" * 10_000,
    "float32",
    "\u202e",
    "@deep",
]
NUMBERS = [0, 1, -1, 2, 4, 8, 63, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64]
VALUES = [*TEXTS, *NUMBERS, 10**400, 0.5, 1e300, -1e300, 1e-320, math.nan, math.inf, -math.inf]
VALUES += [None, True, False, [], {}, [[[]]], [None], {"": None}, {"content": 3}, -(2**63)]


def flip(content: bytes, choose: random.Random, place: Callable | None = None) -> bytes:
    """Change some bytes, and now and then cut, copy or take out a piece."""
    data = bytearray(content or b"\0")
    place = place or (lambda: choose.randrange(len(data)))
    for _ in range(choose.choice((1, 1, 2, 4))):
        i = min(place(), len(data) - 1)
        other = data[min(place(), len(data) - 1)]  # so that a text stays one
        data[i] = choose.choice((other, other, choose.randrange(256), data[i] ^ 1, data[i] ^ 128))
    if choose.random() < 0.2:
        a, b = sorted((place(), place()))
        data[a:b] = choose.choice((b"", data[a:b] * 2, data[a : a + 8], bytes(b - a)))
    return bytes(data)


def flip_front(content: bytes, choose: random.Random) -> bytes:
    """Change bytes, mostly where the header is."""
    return flip(content, choose, lambda: int(len(content) * choose.random() ** 4))


def flip_end(content: bytes, choose: random.Random) -> bytes:
    """Change bytes, mostly at the end, where Parquet has its header."""
    return flip(content, choose, lambda: int(len(content) * (1 - choose.random() ** 4)))


def somewhere(value: object, choose: random.Random) -> tuple:
    """Give a random place in nested lists and objects: the one that holds it, and its key there."""
    while True:
        key = choose.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or choose.random() < 0.3:
            return value, key
        value = value[key]


def odd_json(content: bytes, choose: random.Random) -> bytes:
    """Put odd values into a JSON value at random depths; take some out, rename or copy some."""
    value = json.loads(content)
    for _ in range(choose.choice((1, 1, 2, 3))):
        if not value or not isinstance(value, dict | list):
            break
        table, key = somewhere(value, choose)
        old, how = table[key], choose.random()
        if how < 0.5:
            table[key] = copy.deepcopy(choose.choice(VALUES))
        elif how < 0.7 and type(old) in (int, float):
            table[key] = choose.choice((old + 1, -old, old * 2, old * 1e10, old / 2, str(old)))
        elif how < 0.8:
            source, other = somewhere(value, choose)
            table[key] = json.loads(json.dumps(source[other]))
        else:
            del table[key]
            if how < 0.9 and isinstance(table, dict):
                table[choose.choice(TEXTS)] = old
    return json.dumps(value).replace('"@deep"', "[" * 10**5 + "]" * 10**5).encode()


def odd_line(content: bytes, choose: random.Random) -> bytes:
    """Change, copy or take out a line of a text, or end all lines in another way."""
    lines = content.split(b"\n")
    i = choose.randrange(len(lines))
    odd = [b"", b"=", b"\xff", b"AA== 3", b"QQ== 1_0", b"QQ==  7", b"[" * 9999, b"[]", b"null"]
    odd += [re.sub(rb"\d+$", str(choose.choice(NUMBERS)).encode(), lines[i])] * 3
    odd += [lines[i].replace(b" ", space) for space in (b"  ", b"\t", b"", b"\r", b"\0")]
    odd += [flip(lines[i], choose) for _ in range(4)]
    if lines[i][:1] == b"{":
        odd += [odd_json(lines[i], choose) for _ in range(12)]
    lines[i : i + 1] = [choose.choice(odd)] * choose.choice((1, 1, 1, 2, 0))
    return choose.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)


def odd_header(content: bytes, choose: random.Random) -> bytes:
    """Put odd values into the JSON of a safetensors file, whose length stays right."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = odd_json(content[8:end], choose)
    return len(header).to_bytes(8, "little") + header + content[end:]


def odd_metadata(content: bytes, choose: random.Random) -> bytes:
    """Put an odd type or value, or both, behind a key of a GGUF file."""
    at = choose.choice(list(re.finditer(rb"[a-z]+\.[a-z_.]{4,}", content))).end()
    new = struct.pack("<IQ", choose.randrange(14), choose.choice(NUMBERS) % 2**64)
    start, stop = choose.choice(((0, 4), (0, 8), (0, 12), (4, 8), (4, 12), (8, 16)))
    return content[: at + start] + new[start:stop] + content[at + min(stop, len(new)) :]


def varint(number: int) -> bytes:
    """A number as in protocol buffers."""
    number %= 2**64
    return (bytes([number & 127 | 128]) + varint(number >> 7)) if number > 127 else bytes([number])


def message(field: int, content: bytes) -> bytes:
    """A field of bytes as in protocol buffers."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def odd_proto(content: bytes, choose: random.Random) -> bytes:
    """Append messages to a SentencePiece file: odd pieces, odd options, odd tables."""
    for _ in range(choose.randint(1, 3)):
        text = choose.choice((*TEXTS, "</s>", "a", "▁")).encode(errors="replace")
        score = struct.pack("<f", choose.choice((0, -1, math.nan, math.inf, 1e38)))
        piece = message(1, text) + b"\x15" + score + b"\x18" + varint(choose.randrange(8))
        number = varint(choose.randrange(56) << 3) + varint(choose.choice((*NUMBERS, 3)))
        table = struct.pack("<I", choose.choice((0, 4, 16, 1024))) + choose.randbytes(1024)
        odd = [(1, piece), (2, number), (2, message(choose.randrange(56), text)), (3, number)]
        content += message(*choose.choice([*odd, (3, message(2, table)), (5, message(2, table))]))
    return content


HEADER_SIZES = {1: 46, 3: 30, 5: 22, 6: 56, 7: 20}  # by what follows PK


def poke_zip(content: bytes, choose: random.Random) -> bytes:
    """Write odd numbers into headers of a zip file: offsets, sizes, counts, flags."""
    data = bytearray(content)
    for _ in range(choose.randint(1, 3)):
        header = choose.choice(list(re.finditer(rb"PK([\1\3\5\6\7])[\2\4\6\7]", content)))
        at = header.start() + choose.randrange(4, HEADER_SIZES[header[1][0]], 2)
        size = choose.choice((2, 4, 8))
        old = int.from_bytes(data[at : at + size], "little")
        new = choose.choice((*NUMBERS, -2, old + 1, old - 1, old + 64, old * 2, old ^ 256))
        data[at : at + size] = (new % 256**size).to_bytes(size, "little")
    return bytes(data)


RECORDS = ("Data.pkl", "DATA.PKL", "data.pkl", "data/0", "Data/0", "version", "../x", "byteorder")
RECORDS += (".format_version", "constants.pkl", "", "data", "\x1b[31m", "a" * 999)


def rezip(content: bytes, choose: random.Random, **given: bytes) -> bytes:
    """Write a zip file anew: records renamed, there twice, changed, missing, compressed."""
    records = []
    for record in zipfile.ZipFile(io.BytesIO(content)).infolist():  # their checksums may be wrong
        start = record.header_offset + 30
        start += sum(struct.unpack("<HH", content[start - 4 : start]))
        records.append((record.filename, content[start : start + record.file_size]))
    top = records[0][0].split("/")[0]
    if given:  # the pickle
        records = [(name, given["data"] if name.endswith("data.pkl") else x) for name, x in records]
    for _ in range(0 if given else choose.randint(1, 3)):
        i = choose.randrange(len(records))
        name, data = records[i]
        other = choose.choice((f"{top}/{choose.choice(RECORDS)}", choose.choice(RECORDS)))
        odd = choose.choice((flip(data, choose), b"", b"big", data[: len(data) // 2], data * 2))
        ways = [[(other, data)], [(name, odd)], [(name, data), (name, odd)], [("x", b"")]]
        records[i : i + 1] = choose.choice([*ways, [(name, data), (other, odd)]])
    made = io.BytesIO(b"junk" * 16 if not given and choose.random() < 0.1 else b"")
    made.seek(0, io.SEEK_END)
    with zipfile.ZipFile(made, "a") as archive:
        for name, data in records:
            record = zipfile.ZipInfo(name)  # which has no time of the day
            packed = not given and choose.random() < 0.05
            record.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            archive.writestr(record, data)
        if not given and choose.random() < 0.1:
            archive.comment = content[-99:]  # with an end of a directory in it
    return made.getvalue()


def ops(value: object) -> bytes:
    """The opcodes that pickle a value, in which bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        return b"}" + b"".join(ops(key) + ops(item) + b"s" for key, item in value.items())
    if isinstance(value, tuple | list):
        items, end = b"".join(map(ops, value)), b"t" if isinstance(value, tuple) else b"l"
        return b"(" + items + end
    return pickle.dumps(value, 2)[2:-1]


def named(name: str) -> bytes:
    """The opcode that looks up "module name"."""
    return f"c{name.replace(' ', chr(10))}\n".encode()


def call(name: str, *arguments: object) -> bytes:
    """The opcodes that call what has this name."""
    return named(name) + ops(arguments) + b"R"


def storage_ops(numel, key="0", kind="Float", place="cpu") -> bytes:
    """The opcodes of a record of so many numbers."""
    return ops(("storage", named(f"torch {kind}Storage"), key, place, numel)) + b"Q"


def tensor_ops(size, stride=None, offset=0, numel=None, **storage) -> bytes:
    """The opcodes of a tensor, which may contradict themselves."""
    stride = tuple(math.prod(size[i + 1 :]) for i in range(len(size))) if stride is None else stride
    record = storage_ops(math.prod(size) if numel is None else numel, **storage)
    hooks = call("collections OrderedDict")
    return call("torch._utils _rebuild_tensor_v2", record, offset, size, stride, False, hooks)


def hostile_value(shape: tuple, choose: random.Random) -> bytes:
    """Opcodes of what a stranger might put in the place of a tensor."""
    odd = choose.choice(NUMBERS)
    few = tuple(choose.choice((*NUMBERS[:7], *shape, odd)) for _ in range(choose.randrange(4)))
    kind = choose.choice(("Double", "Half", "BFloat16", "Bool", "ComplexFloat", "QInt8", "Untyped"))
    flat = (0,) * len(shape)
    given = [{"size": few}, {"stride": few}, {"stride": flat}, {"offset": odd}, {"numel": odd}]
    given += [{"size": few, "stride": few}, {"stride": flat, "numel": 1}, {"size": (2**31, 2**31)}]
    given += [{"kind": kind}, {"place": "meta"}, {"place": "cuda"}, {"key": "99"}, {"key": None}]
    tensor = tensor_ops(**({"size": shape} | choose.choice(given)))
    hooks, meta = call("collections OrderedDict"), named("torch float32")
    quantized = (storage_ops(64, kind="QInt8"), 0, shape, (1,))
    quantized += ((named("torch per_tensor_affine"), 1.0, 0), False, hooks)
    called = {
        "torch._utils _rebuild_parameter": (tensor, odd, hooks),
        "torch._utils _rebuild_parameter_with_state": (tensor, False, hooks, {"data": 3}),
        "torch._utils _rebuild_meta_tensor_no_storage": (meta, (odd, 4), (4, 1), False),
        "torch._utils _rebuild_qtensor": quantized,
        "torch._utils _rebuild_sparse_tensor": (named("torch sparse_coo"), (tensor, tensor, few)),
        "torch._utils _rebuild_nested_tensor": (tensor, tensor, tensor, tensor),
        "torch._utils _rebuild_device_tensor_from_numpy": (tensor, meta, "cpu", False),
        "torch._tensor _rebuild_from_type_v2": (meta, named("torch FloatTensor"), few, {}),
        "builtins bytearray": (choose.choice((odd, few)),),
        "builtins set": ([1, 2],),
        "builtins eval": ("1",),
        "os system": ("true",),
        "_codecs encode": ("x" * 99, "utf-8"),
        "torch Size": (few,),
        "torch Tensor": (odd,),
        "torch device": ("meta",),
        "collections Counter": ({"a": odd},),
    }
    values = [call(name, *arguments) for name, arguments in called.items()]
    values += [tensor + ops({"grad": 1}) + b"b", hooks + ops({"x": tensor}) + b"b"]
    values += [code + struct.pack("<I", 2**31 - 1) for code in (b"X", b"B", b"r", b"j", b"\x8b")]
    values += [code + struct.pack("<Q", 2**62) for code in (b"\x8d", b"\x8e", b"\x95", b"\x96")]
    values += b". 0 1 2 hc P0\n K\1Q \x82\1 I9_9\n ]q\1h\1a".split(b" ")
    values += [b"(" * 5000, b"(" + b"N" * 10**6 + b"t", b"I" + b"9" * 5000 + b"\n"]
    twice = b")q\1" + b"h\1h\1\x86q\1" * 60  # a tuple of itself twice, of itself twice …
    values += [twice, b"}" + twice + b"K\1s"]
    values += map(ops, ({"x": tensor}, {}, [], (), None, 3, odd, 0.5, "a" * 999, {3: tensor}))
    return choose.choice([tensor] * (len(values) // 2) + values)


def hostile(content: bytes, choose: random.Random) -> bytes:
    """Put a pickle into a file of torch.save that is what it was but for one or two values."""
    try:
        value = torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError:  # it holds more than tensors
        return rezip(content, choose)
    keys, shapes = itertools.count(), [(4, 16)]

    def of_tensor(tensor: torch.Tensor) -> bytes:
        shapes.append(tuple(tensor.shape))
        return tensor_ops(shapes[-1], key=str(next(keys)))

    value = tree_map_only(torch.Tensor, of_tensor, dict(value))
    for _ in range(choose.choice((1, 1, 2))):
        table, key = somewhere(value, choose)
        table[key] = hostile_value(choose.choice(shapes), choose)
        if choose.random() < 0.1:
            table[choose.choice((*TEXTS[:-1], 3, None, True, (), key))] = table.pop(key)
    pickled = ops(value)
    if choose.random() < 0.05:
        pickled = choose.choice((hostile_value((4, 16), choose), pickled * 2, pickled[:-9]))
    return rezip(content, choose, data=b"\x80\2" + pickled + b".")


def other_dtype(content: bytes, choose: random.Random) -> bytes:
    """Make an adapter of another shape or dtype, or of odd numbers."""
    names = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex64", "int64")
    names += ("int8", "uint16", "bool", "float16", "bfloat16", "float64", "float32")
    dtype = getattr(torch, choose.choice(names))
    number = choose.choice((1e300, 1e39, math.nan, 1, 7e4))
    shape = choose.choice(((4, 16), (0, 16), (16,), (1, 4, 16), (4, 15), (4, 0), (), (2**20, 16)))
    numbers = torch.full((4, 16), number, dtype=torch.float64).to(dtype)
    raw = torch.frombuffer(bytearray(choose.randbytes(64 * dtype.itemsize)), dtype=torch.uint8)
    prompt = choose.choice((numbers, raw.view(dtype).reshape(4, 16), torch.ones(shape)))
    state = {choose.choice(("prompt_embeddings", "prompt_embeddings", "embedding.weight")): prompt}
    if content[:2] != b"PK":
        return safetensors.torch.save(state)
    made = io.BytesIO()
    torch.save(state, made)
    return made.getvalue()


def any_way(content: bytes, choose: random.Random) -> bytes:
    """Damage a file in a way that suits its content."""
    ways = [flip]
    if content[:2] == b"PK":
        ways += [flip_front, poke_zip, rezip, hostile]
    elif content[:1] in (b"{", b"["):
        ways += [odd_json] * 3
    elif content[8:9] == b"{":
        ways += [flip_front, odd_header, odd_header, other_dtype]
    return choose.choice(ways)(content, choose)


# Parts of a tokenizer.json that none which came with a model has: the name of each, its value.
PARTS = r"""
normalizer {"type": "Sequence", "normalizers": [@double]}
normalizer {"type": "Prepend", "prepend": "@long"}
normalizer {"type": "Prepend", "prepend": ""}
normalizer @replace
normalizer {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "@some"}, @replace]}
normalizer {"type": "Replace", "pattern": {"String": ""}, "content": "aa"}
normalizer {"type": "Replace", "pattern": {"Regex": ""}, "content": "aa"}
normalizer {"type": "Replace", "pattern": {"Regex": "(?<=a)a|$"}, "content": "@long"}
normalizer {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA////"}
normalizer {"type": "Precompiled", "precompiled_charsmap": "AAQAAP////8AAAAA"}
normalizer {"type": "Strip", "strip_left": true, "strip_right": true}
normalizer {"type": "NFKD"}
normalizer {"type": "Nmt"}
normalizer {"type": "ByteLevel"}
pre_tokenizer {"type": "Split", "pattern": @slow, "behavior": "Isolated", "invert": true}
pre_tokenizer {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": false}
pre_tokenizer {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": true}
pre_tokenizer {"type": "FixedLength", "length": 0}
pre_tokenizer {"type": "FixedLength", "length": 9223372036854775808}
pre_tokenizer {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}
pre_tokenizer {"type": "CharDelimiterSplit", "delimiter": "a"}
pre_tokenizer {"type": "Sequence", "pretokenizers": []}
pre_tokenizer {"type": "UnicodeScripts"}
pre_tokenizer null
decoder {"type": "Strip", "content": "a", "start": 1000000000, "stop": 1000000000}
decoder {"type": "Strip", "content": "H", "start": 3, "stop": 3}
decoder {"type": "BPEDecoder", "suffix": ""}
decoder {"type": "WordPiece", "prefix": "", "cleanup": true}
decoder {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true}
decoder {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}
decoder {"type": "Sequence", "decoders": [@double]}
decoder @replace
decoder {"type": "Sequence", "decoders": [{"type": "Fuse"}, @replace]}
decoder {"type": "Replace", "pattern": {"String": ""}, "content": "@long"}
decoder {"type": "ByteFallback"}
decoder {"type": "Fuse"}
decoder null
post_processor {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
post_processor {"type": "TemplateProcessing", "single": [@end], "pair": [], "special_tokens": @ids}
post_processor {"type": "TemplateProcessing", "single": [@end], "pair": [], "special_tokens": {}}
post_processor {"type": "BertProcessing", "sep": ["</s>", 4294967295], "cls": ["<s>", 9999]}
post_processor {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true}
model {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
model {"type": "WordLevel", "vocab": {"a": 4294967295, "</s>": 1}, "unk_token": "a"}
model {"type": "WordPiece", "unk_token": "b", "vocab": {"</s>": 0}, "max_input_chars_per_word": 9}
model {"type": "Unigram", "unk_id": null, "vocab": [["a", 0.0], ["</s>", -1.0]]}
model {"type": "Unigram", "unk_id": 0, "vocab": [["</s>", 0.0]], "byte_fallback": true}
model {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["</s>", 0.0]]}
model {"type": "Unigram", "unk_id": 9, "vocab": [["</s>", 0.0]]}
model {"type": "BPE", "vocab": {"</s>": 0}, "merges": [], "byte_fallback": true}
model.unk_token "none"
model.unk_token ""
model.dropout 0.5
model.dropout 2.0
model.continuing_subword_prefix "##"
model.continuing_subword_prefix "@long"
model.end_of_word_suffix "</w>"
model.end_of_word_suffix "@long"
model.byte_fallback true
model.merges []
model.merges [["a", "b"], ["a", "a"]]
model.vocab {"a": 0}
model.vocab {"</s>": 4294967295}
added_tokens [{"id": 0, "content": "", "special": true, @marks}]
added_tokens [{"id": 600, "content": "a", "special": false, @marks}]
added_tokens [{"id": 4294967295, "content": "b", "special": true, @marks}]
added_tokens [{"id": 5, "content": "\n", "special": false, @marks}]
added_tokens [{"id": 600, "content": "@long", "special": true, @marks}]
truncation {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}
padding {"strategy": {"Fixed": 99999999999}, "direction": "Left", "pad_id": 9, @padding}
"""
SHORT = {
    "@double": ", ".join(['{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}'] * 40),
    "@replace": '{"type": "Replace", "pattern": @slow, "content": "b"}',
    "@slow": '{"Regex": "(a|a|aa)+z"}',  # on many an "a" it takes forever
    "@some": "a" * 60,
    "@long": "a" * 10**6,
    "@end": '{"SpecialToken": {"id": "</s>", "type_id": 0}}',
    "@ids": '{"</s>": {"id": "</s>", "ids": [4294967295], "tokens": ["</s>"]}}',
    "@marks": '"single_word": false, "lstrip": true, "rstrip": true, "normalized": true',
    "@padding": '"pad_type_id": 0, "pad_token": "", "pad_to_multiple_of": 0',
}


def odd_tokenizer(content: bytes, choose: random.Random) -> bytes:
    """Give a tokenizer.json one or two parts that no honest one has."""
    value = json.loads(content)
    for _ in range(choose.choice((1, 1, 2))):
        name, _, text = choose.choice(PARTS.strip().splitlines()).partition(" ")
        for short, long in SHORT.items():
            text = text.replace(short, long)
        holder, _, key = name.rpartition(".")
        table, part = value[holder] if holder else value, json.loads(text)
        table[key] = table[key] + part if key == "added_tokens" else part
    return json.dumps(value).encode()
