"""Hostile inputs: whole files damaged byte by byte, and nearly valid ones built from their parts."""

from __future__ import annotations

import base64
import copy
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

Bytes = st.SearchStrategy[bytes]

RECIPE = {
    "prompt": "a dog",
    "seed": 3,
    "model": "demo",
    "fingerprints": {"tokenizer": "0" * 64},
    "ratio": 1.0,
    "bits": 16,
    "subjects": [{"name": "dog", "token": "[V]", "scale": 1.0, "sha256": "0" * 64}],
    "width": 64,
    "height": 64,
    "cfg": [1.0, 2.0],
    "top_p": 0.9,
}
"""What a picture was drawn by."""
PNG = b"\x89PNG\r\n\x1a\n"
HUGE = (2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 10**400)
TEXTS = (
    "",
    " ",
    "x",
    "../../x",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "CON",
    "a\0b",
    "a\nb",
    "\x1b]0;owned\x07\x1b[2J",
    "\x9b31m",
    "\u202egnp.exe",
    "\ud800",
    "\udcff",
    "\ufeff",
    "[/red][link=file:///x]y",
    "[bold",
    "{0.__class__}",
    "%s%n",
    "$(touch x)",
    "`touch x`",
    "__import__('os').system('touch x')",
    "!!python/object/apply:os.system ['touch x']",
    "1e999",
    "nan",
    "-0",
    "0x10",
    "1:1:1",
    "x" * 5000,
    "é" * 300,
    "\U0001f600",
    "_" * 70,
)
PIECES = (
    b"\xff" * 8,
    bytes(8),
    b"7" * 12,
    b"[" * 60,
    b'"\\ud800"',
    b"\x1b]0;x\x07",
    b"../" * 5,
    b"NaN",
    b"1e999",
    b"-1",
    b"{}",
    b"null",
    b"9" * 5000,
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\x00\x01",
    b"\x7f\xff\xff\xff",
    b"!!python/name:os.system",
    b"&a [*a]",
)
YAML = (
    "&a [*a]",
    "&a {b: *a}",
    "!!python/object/apply:os.system ['touch escaped']",
    "!!python/name:os.system",
    "!!binary x",
    "!!set {a}",
    "!!timestamp 9999-99-99",
    "2001-12-14t21:59:43.10-99:99",
    ":".join(["1"] * 300) + ".0",
    "0x" + "f" * 5000,
    "9" * 5000,
    "0b",
    "0o",
    "0x_",
    "!!int ''",
    "!!float ''",
    "!!omap [a]",
    "!!pairs [a]",
    "{? {a: b} : c}",
    "{[a]: b}",
    "<<: 3",
    "{<<: *x}",
    "{<<: [1]}",
    "[" * 300,
    "- " * 300,
    "? " * 300,
    "\t",
    "%YAML 9.9\n---",
    "---\n---\n",
    "*x",
    "|9\n a",
    "&a [&b [&c [x,x,x,x,x,x,x,x,x],*c,*c,*c,*c,*c,*c,*c,*c],*b,*b,*b,*b,*b,*b,*b]",
    "'\\ud800'",
    '"\\ud800"',
    '"\\x1b[2J"',
    "=",
    "!!null x",
    "!!bool x",
    "1e400",
    ".nan",
    ".inf",
    "!<tag:yaml.org,2002:python/tuple> [1]",
    "!!str {a: b}",
)
PICKLES = (
    b"cposix\nsystem\n(S'touch escaped'\ntR.",
    b"cos\nsystem\n(S'touch escaped'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"ctorch.hub\nload\n(S'x'\ntR.",
    b"ctorch\nload\n(S'../secret.txt'\ntR.",
    b"cbuiltins\nopen\n(S'../escaped'\nS'w'\ntR.",
    b"]" * 400 + b".",
    b"N.",
    b"}.",
    b"(" * 3000 + b"t.",
    b"\x80\x04\x95" + b"\xff" * 8 + b".",
    b"X\xff\xff\xff\x7fa.",
    b"ccollections\nOrderedDict\n)R.",
    b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\ntR.",
    b"I" + b"9" * 6000 + b"\n.",
    b"ctorch.storage\nUntypedStorage\n(I99999999999\ntR.",
    b"cbuiltins\nbytearray\n(I99999999999\ntR.",
    b"ctorch\nzeros\n(I99999999999\ntR.",
    b"\x80\x02}q\x00q\x01a.",
    b"h\x09.",
    b"0.",
)


def inputs(kind: str, seeds: Sequence[bytes], names: Sequence[str] = ()) -> Bytes:
    """Inputs for a reader.

    Args:
        kind: `json`, `lines`, `yaml`, `tar`, `safetensors`, `png`, `torch` or `bytes`.
        seeds: valid files.
        names: hostile names of files that are there.
    """
    nearly: dict[str, Callable[[bytes, st.SearchStrategy[Any]], Bytes]] = {
        "json": _json,
        "lines": _lines,
        "yaml": _yaml,
        "tar": _tar,
        "safetensors": _safetensors,
        "png": _png,
        "torch": _torch,
    }
    kinds = [st.sampled_from(seeds).flatmap(damaged), st.sampled_from(seeds), st.binary(max_size=400)]
    if kind in nearly:
        kinds += [st.sampled_from(seeds).flatmap(lambda seed: nearly[kind](seed, values(names)))] * 4
    return st.one_of(kinds)


def values(names: Sequence[str] = ()) -> st.SearchStrategy[Any]:
    """Values of JSON that are not what a reader expects."""
    texts = st.one_of(st.sampled_from([*TEXTS, *names]), st.text(max_size=20), st.characters().map(str))
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(HUGE),
        st.floats(),
        st.sampled_from((0, -1, 1)),
        texts,
    )
    deep = st.integers(1, 400).map(_nested)
    return st.one_of(leaves, deep, st.recursive(leaves, _grown, max_leaves=6))


def damaged(content: bytes) -> Bytes:
    """The content cut, with bytes changed, doubled or left out, once or several times."""
    place = st.integers(0, 2**16 - 1)
    edit = st.tuples(st.integers(0, 6), place, place, st.sampled_from(PIECES), st.integers(0, 255))
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edited(content, edits))


def _edited(content: bytes, edits: Sequence[tuple[int, int, int, bytes, int]]) -> bytes:
    changed = bytearray(content)
    for kind, first, second, piece, byte in edits:
        place, other = first * len(changed) >> 16, second * len(changed) >> 16
        if kind == 0:
            del changed[place:]
        elif kind == 1 and changed:
            changed[place] = byte
        elif kind == 2:
            changed[place : place + len(piece)] = piece
        elif kind == 3:
            changed[place:place] = piece
        elif kind == 4:
            changed[place:place] = changed[other : other + second % 700]
        elif kind == 5:
            del changed[place : place + 1 + second % 64]
        elif changed:
            changed[place] ^= 1 << byte % 8
    return bytes(changed)


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3))


def _nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


@st.composite
def altered(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any]) -> Any:
    """A document of JSON with some of its values replaced, taken out, doubled or renamed."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        _collect(document, places)
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places)) if len(places) > 1 else places[0]
        what = draw(st.integers(0, 5))
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS))] = holder[key]
        elif what == 1:
            holder.append(holder[key])
        elif what == 2:
            holder[key] = [holder[key]]
        else:
            holder[key] = draw(values)
    return document


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        places.append((value, key))
        _collect(inner, places)


def _dumped(value: Any, *, plain: bool) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5000


_RAW_JSON = (
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"[" * 900 + b"]" * 900,
    b'{"a":' * 990 + b"1" + b"}" * 990,
    b"1" * 5000,
    b"1e999",
    b"",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b'{"a":1,"a":2}',
    b"0",
    b"true",
    b'"\\ud800"',
)


def _json(seed: bytes, values: st.SearchStrategy[Any]) -> Bytes:
    document = json.loads(seed)
    made = st.tuples(altered(document, values), st.booleans()).map(lambda drawn: _dumped(drawn[0], plain=drawn[1]))
    return st.one_of(made, made, made, st.sampled_from(_RAW_JSON))


@st.composite
def _lines(draw: st.DrawFn, seed: bytes, values: st.SearchStrategy[Any]) -> bytes:
    whole = seed.split(b"\n")
    lines = list(whole)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(lines) - 1))
        is_json = whole[place].startswith(b"{")
        lines[place] = draw(_json(whole[place], values) if is_json else damaged(whole[place]))
    return b"\n".join(lines)


@st.composite
def _yaml(draw: st.DrawFn, seed: bytes, values: st.SearchStrategy[Any]) -> bytes:
    text = seed.decode()
    if draw(st.booleans()):
        lines = text.splitlines()
        place = draw(st.integers(0, len(lines) - 1))
        key = lines[place].partition(":")[0]
        lines[place] = draw(st.sampled_from((f"{key}: ", ""))) + draw(st.sampled_from(YAML))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    document = draw(altered(yaml.safe_load(text), values))
    try:
        return yaml.safe_dump(document, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5000
    except ValueError:
        return b"name: " + b"9" * 5000


@st.composite
def _safetensors(draw: st.DrawFn, seed: bytes, values: st.SearchStrategy[Any]) -> bytes:
    length = int.from_bytes(seed[:8], "little")
    header, body = json.loads(seed[8 : 8 + length]), seed[8 + length :]
    facts = header.get("__metadata__", {})
    inner = [name for name, text in facts.items() if text.startswith("{")]
    if inner and draw(st.integers(0, 3)):
        facts[inner[0]] = draw(_json(facts[inner[0]].encode(), values)).decode("utf-8", "replace")
        written = _dumped(header, plain=True)
    else:
        written = draw(_json(seed[8 : 8 + length], values))
    claimed = draw(st.sampled_from((len(written),) * 8 + (0, len(written) + 1, 2**63, 2**64 - 1, 100_000_000)))
    return claimed.to_bytes(8, "little") + written + draw(st.sampled_from((body, body, body, b"", body + b"x")))


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@st.composite
def _png(draw: st.DrawFn, seed: bytes, values: st.SearchStrategy[Any]) -> bytes:
    """A PNG whose chunks of text hold a recipe that is none, and perhaps bits that are none."""
    recipe = draw(_json(json.dumps(RECIPE).encode(), values))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        text = chunk(b"tEXt", b"bitgen\0" + recipe)
    elif kind == 1:
        text = chunk(b"zTXt", b"bitgen\0\0" + zlib.compress(recipe * draw(st.sampled_from((1, 1, 1, 300)))))
    elif kind == 2:
        text = chunk(b"iTXt", b"bitgen\0\0\0en\0\0" + recipe)
    elif kind == 3:
        text = chunk(b"iTXt", b"bitgen\0\1\0en\0\0" + zlib.compress(recipe))
    else:
        text = chunk(
            draw(st.sampled_from((b"tEXt", b"iTXt", b"zTXt", b"iCCP", b"eXIf", b"acTL"))), b"bitgen\0" + recipe[:50]
        )
    bits = draw(st.one_of(st.just(b""), st.binary(min_size=20, max_size=22), st.binary(max_size=60)))
    carried = draw(st.sampled_from((base64.b64encode(bits), bits, bits * 300)))
    if draw(st.booleans()):
        text += chunk(b"zTXt", b"bitgen-bits\0\0" + zlib.compress(carried))
    shape = draw(st.sampled_from((seed[8:33],) * 6 + (_shape(2**31 - 1, 2**31 - 1), _shape(0, 0), _shape(1, 10**8))))
    behind = draw(st.sampled_from((seed[33:],) * 4 + (b"", chunk(b"IEND", b""))))
    parts = draw(st.sampled_from(((shape, text, behind),) * 3 + ((text, shape, behind), (shape, behind, text))))
    return PNG + b"".join(parts)


def _shape(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@st.composite
def _tar(draw: st.DrawFn, seed: bytes, values: st.SearchStrategy[Any]) -> bytes:
    """A tar of hostile members among those of the seed."""
    stream = io.BytesIO()
    known: list[tuple[str, bytes]] = []
    with tarfile.open(fileobj=io.BytesIO(seed)) as tar:
        for member in tar:
            opened = tar.extractfile(member)
            known.append((member.name, opened.read() if opened else b""))
    names = [name for name, _ in known] + ["../escaped.png", "/escaped.png", "a/../../b.png", "\x1b[2J.png", "c.txt"]
    kinds = (tarfile.REGTYPE,) * 6 + (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        b"Z",
    )
    for _ in range(draw(st.integers(1, 5))):
        member = tarfile.TarInfo(draw(st.sampled_from(names)))
        content = draw(st.sampled_from([content for _, content in known] + [b'{"text": "x"}', b"30 mtime=nan\n", b""]))
        member.type, member.linkname = (
            draw(st.sampled_from(kinds)),
            draw(st.sampled_from(("../secret.txt", "/etc/passwd"))),
        )
        member.size = draw(st.sampled_from((len(content),) * 6 + (0, 2**33, 8**11 - 1, 2**70)))
        member.pax_headers = draw(
            st.sampled_from(
                (
                    {},
                    {},
                    {"size": "-1"},
                    {"path": "../escaped.png"},
                    {"GNU.sparse.map": "0,9999999999"},
                    {"mtime": "nan"},
                    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 20},
                    {"size": "9" * 5000},
                    {"uid": "x"},
                    {"linkpath": "/etc/passwd", "hdrcharset": "BINARY"},
                )
            )
        )
        try:
            head = member.tobuf(
                draw(st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))), "utf-8", "surrogateescape"
            )
        except (ValueError, OverflowError):
            continue
        stream.write(head + content + bytes(-len(content) % 512))
    stream.write(bytes(1024))
    return draw(st.one_of(st.just(stream.getvalue()), damaged(stream.getvalue())))


@st.composite
def _torch(draw: st.DrawFn, seed: bytes, values: st.SearchStrategy[Any]) -> bytes:
    """A pickle that wants to do something, bare or where torch keeps its own."""
    wanted = draw(st.sampled_from(PICKLES))
    if not seed.startswith(b"PK") or draw(st.booleans()):
        return draw(st.sampled_from((wanted, b"\x80\x02" + wanted, seed[:30] + wanted)))
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as whole, zipfile.ZipFile(stream, "w") as changed:
        for name in whole.namelist():
            content = wanted if name.endswith("data.pkl") else whole.read(name)
            where = draw(st.sampled_from((name,) * 8 + (f"../../{name}", f"/{name}")))
            changed.writestr(where, content)
    return stream.getvalue()
