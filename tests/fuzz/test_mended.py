"""Inputs that once ended in a traceback or would not end: each is refused with one error, or read."""

from __future__ import annotations

import json
from pathlib import Path

import hostile
import pytest
from readers import READERS, Prepared

DEEP = b"[" * 100_000
BOMB = "\n".join(["- &a0 x"] + [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)])


def _deep_recipe(seed: bytes) -> bytes:
    return seed[:33] + hostile.chunk(b"tEXt", b"bitgen\0" + b'{"a":' * 2000) + seed[33:]


def _changed(seed: bytes, *path: str, to: object) -> bytes:
    document = json.loads(seed)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(document).encode()


REFUSED = {
    "JSON nested too deeply": ("model config", lambda seed: DEEP),
    "a recipe nested too deeply": ("recipe", _deep_recipe),
    "a prompt nested too deeply": ("prompts", lambda seed: b'{"prompt":' * 50_000),
    "a width beyond all numbers": (
        "model config",
        lambda seed: _changed(seed, "config", "model", "transformer", "width", to=10**400),
    ),
    "channels whose square is beyond all numbers": (
        "model config",
        lambda seed: _changed(seed, "config", "model", "tokenizer", "channel_multipliers", to=[1, 2**31 - 1, 2]),
    ),
    "channels that no memory is counted in": (
        "model config",
        lambda seed: _changed(seed, "config", "model", "transformer", "width", to=2**31),
    ),
    "a million blocks": (
        "model weights",
        lambda seed: _changed(seed, "config", "model", "transformer", "depth", to=10**6),
    ),
    "aliases of aliases": ("yaml", lambda seed: f"name:\n{BOMB}".encode()),
    "a number of thousands of digits": ("yaml", lambda seed: b"name: 0x" + b"f" * 9000),
    "a tag that its value is not": ("yaml", lambda seed: b"name: !!bool x"),
    "a number in base 60 that no float holds": ("yaml", lambda seed: b"name: " + b"1:" * 300 + b"1.0"),
    "aliases in --set": ("override", lambda seed: f"name=[{BOMB.replace(chr(10) + '- ', ', ')[2:]}]".encode()),
    "a tag in --set": ("override", lambda seed: b"name=!!bool x"),
    "half a character in --set": ("override", lambda seed: b"name\xff=1"),
    "data that is no text": ("resume", lambda seed: _changed(seed, "data", to=0.5)),
    "a text encoder of another type": ("text encoder", lambda seed: _changed(seed, "num_heads", to="-0")),
    "a text encoder of more layers than there is time for": (
        "text encoder",
        lambda seed: _changed(seed, "num_layers", to=2**64),
    ),
    "weights that end within a number": ("weights.pth", lambda seed: b"\x80\x02X\x01"),
    "names that no file can have": (
        "metadata.jsonl",
        lambda seed: json.dumps({"file_name": "x" * 5000, "text": "a"}).encode(),
    ),
    "a checkpoint of files whose names no file can have": (
        "checkpoint",
        lambda seed: _changed(seed, "files", to={"x" * 5000: 3}),
    ),
    "a vocabulary that puts together what it has not": (
        "vocabulary",
        lambda seed: _changed(seed, "model", "merges", to=[["h", "e"], ["/etc/passwd", "n"]]),
    ),
    "a vocabulary that cannot say what it does not know": (
        "vocabulary",
        lambda seed: _changed(seed, "model", "unk_token", to="<un>"),
    ),
    "measurements of which none is text": ("metrics.jsonl", lambda seed: b"\xff\xfe\n" + DEEP + b"\n"),
}
READ = {
    "a photo of which nothing is told": ("subject", lambda seed: seed.replace(rb"\"file\":", rb"\"else\":", 1)),
    "a shape beyond all numbers": ("split", lambda seed: seed.replace(b"0.6", b"9" * 400, 1)),
    "a step that is no number": ("sweep state", lambda seed: _changed(seed, "step", to="three")),
}


@pytest.mark.parametrize("what", [*REFUSED, *READ])
def test_what_once_broke_a_reader(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make = (REFUSED | READ)[what]
    (tmp_path / "box").mkdir()
    prepared = Prepared.of(READERS[name], tmp_path / "box")
    monkeypatch.chdir(prepared.box.here)
    outcome = prepared.attempt(make(prepared.seeds[-1] if name == "recipe" else prepared.seeds[0]))
    assert outcome.failure is None
    assert outcome.refused == (what in REFUSED)
