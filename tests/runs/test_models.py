"""`--model`: published models fetched from a hub on this machine, and files of the user's own in every layout."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback_hub import Hub, etag, serve
from published_layouts import (
    SMALLER,
    T5,
    TEXT_LENGTH,
    plain_blocks,
    plain_tokenizer,
    repositories,
    sharded,
    text_encoder,
    torch_file,
    weights_of,
    weights_of_text_encoder,
)
from safetensors.torch import save, save_file
from torch import Tensor

from bitgen_cli.__main__ import main
from bitgen_cli.engine.hub import any_text_encoder_files
from bitgen_cli.engine.infinity_weights import renamed_tokenizer, renamed_transformer
from bitgen_cli.engine.model_folder import load_model, read_model_config, read_origin, write_origin
from bitgen_cli.engine.text import encoder_fingerprint, load_text_encoder, text_folder
from bitgen_cli.errors import InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.files import only_writer, sha256
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent, Task
from bitgen_cli.runs import published
from bitgen_cli.runs.models import PARTS, provide_model
from bitgen_cli.runs.published import REPOSITORY
from bitgen_cli.runs.start import Init, first_tokenizer
from bitgen_cli.runs.text_features import find_text

TOKENIZER, TRANSFORMER = ("tokenizer",), ("transformer",)
AS_PUBLISHED = dict(published.CATALOGUE)
CHUNK = 50_000
"""Bytes after which the client writes; its own 10 MB are more than these files have."""
VAE, MAIN = "infinity_vae_d32reg.pth", "infinity_2b_reg.pth"


@pytest.fixture(scope="module")
def contents() -> dict[str, dict[str, bytes]]:
    return repositories()


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has fetched nothing, on a machine whose network leads nowhere."""
    from huggingface_hub import constants

    monkeypatch.setenv("BITGEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    _point(monkeypatch, "http://127.0.0.1:9")
    for name, entry in SMALLER.items():
        monkeypatch.setitem(published.CATALOGUE, name, entry)


def _point(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What HF_ENDPOINT does when a process begins."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(contents: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as running:
        running.files = {name: dict(files) for name, files in contents.items()}
        _point(monkeypatch, running.address)
        yield running


def expected(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights as a model folder must have them."""
    renamed = renamed_tokenizer if name.startswith("tok") else renamed_transformer
    return {key: value.to(dtype).float() for key, value in renamed(weights_of(name)).tensors.items()}


def is_model(folder: Path, transformer: str = "transformer_tiny", tokenizer: str = "tok_d32") -> bool:
    """Whether a model folder holds these published weights."""
    model = load_model(folder, parts=("tokenizer", "transformer"))
    assert model.transformer is not None
    assert model.tokenizer is not None
    wanted = expected(transformer, torch.bfloat16), expected(tokenizer, torch.float32)
    found = model.transformer.state_dict(), model.tokenizer.state_dict()
    return all(
        own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
        for own, other in zip(found, wanted, strict=True)
    )


# -- fetched -----------------------------------------------------------------------------------------------------------


def test_a_published_model_is_fetched_converted_once_and_drawn_with(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    hub.token = "mine"
    words = ["sample", "a red dog", "--model", "infinity-2b", "--seed", "1", "--device", "cpu", "--json"]
    assert main([*words, "-o", str(tmp_path / "a.png")]) == 0
    drawn = json.loads(capsys.readouterr().out)["pictures"][0]
    commits = {REPOSITORY: hub.commit(REPOSITORY), T5: hub.commit(T5)}
    assert drawn["revisions"] == commits
    folder = tmp_path / "home" / "models" / "infinity-2b"
    assert is_model(folder)
    assert drawn["fingerprints"] == read_model_config(folder)[2]
    assert main(["inspect-config", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["revisions"] == commits
    assert not hub.leaked
    assert {key for key in hub.asked if "infinity_8b" in key[1] or "README" in key[1]} == set()
    reports = read_origin(folder).reports
    assert {part: len(found["loaded"]) for part, found in reports.items()} == {
        "tokenizer": len(expected("tok_d32", torch.float32)),
        "transformer": len(expected("transformer_tiny", torch.float32)),
        "text_encoder": 12,
    }
    assert not any(found[kind] for found in reports.values() for kind in ("new", "dropped", "misshapen"))
    assert reports["transformer"]["source"] == f"{REPOSITORY}/{MAIN}"
    assert any(key.startswith("decoder.") for key in reports["text_encoder"]["unneeded"])
    # the second time nothing is asked, even when everything that was fetched is gone
    shutil.rmtree(tmp_path / "hub")
    hub.status, hub.asked[:] = 500, []
    assert main([*words, "--offline", "-o", str(tmp_path / "b.png")]) == 0
    assert hub.asked == []
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_sharded_patchified_and_plain_names(hub: Hub) -> None:
    folder = provide_model("infinity-8b", parts=TRANSFORMER)
    assert is_model(folder, "transformer_patchify", "tok_d14_f8")
    assert read_model_config(folder)[0].bits_per_position == 56


def test_who_tokenizes_fetches_a_tokenizer_alone(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("infinity-vae-d64", "infinity-2b"):
        assert main(["tokenize", "world:2", str(tmp_path / name), "--model", name, "--device", "cpu"]) == 0
    asked = {path for _, path, _ in hub.asked}
    assert not [path for path in asked if MAIN in path or T5 in path]
    assert not hub.sent(MAIN)
    with pytest.raises(UsageError, match="infinity-vae-d64 is a tokenizer alone"):
        provide_model("infinity-vae-d64")
    # what is fetched later is of the same commit, whatever the hub has by then
    commit = read_origin(provide_model("infinity-2b", parts=TOKENIZER)).revisions[REPOSITORY]
    hub.files[REPOSITORY]["README.md"] = b"# newer"
    with pytest.raises(InputError, match=f"has no revision {commit}"):
        provide_model("infinity-2b", parts=TRANSFORMER)


def test_a_revision_is_a_model_of_its_own(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit(REPOSITORY)
    folder = provide_model(f"infinity-2b@{commit}", parts=TOKENIZER)
    assert folder == tmp_path / "home" / "models" / f"infinity-2b@{commit}"
    with pytest.raises(InputError, match="has no revision nine"):
        provide_model("infinity-2b@nine", parts=TOKENIZER)
    with pytest.raises(UsageError, match="is no revision"):
        provide_model("infinity-2b@../..", parts=TOKENIZER)


def test_files_that_other_programs_have_fetched_are_used(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPOSITORY, VAE)
    hub.asked.clear()
    hub.status = 500
    assert provide_model("infinity-2b", parts=TOKENIZER).is_dir()
    assert hub.asked == []


# -- text encoders -----------------------------------------------------------------------------------------------------

TEXT = ("text_encoder",)
SHARD = "model-00001-of-00002.safetensors"


def text_weights(folder: Path) -> Path:
    return folder / "text_encoder" / "model.safetensors"


@pytest.mark.parametrize("links", [True, False])
def test_models_share_one_text_encoder(hub: Hub, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    first = provide_model("infinity-2b", parts=TEXT)
    commit, made = hub.commit(T5), read_model_config(first)[2]["text_encoder"]
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    hub.asked.clear()
    hub.files[T5]["README.md"] = b"# newer"
    report = Silent()
    second = provide_model("infinity-8b", report, TEXT)
    assert not [path for _, path, _ in hub.asked if T5 in path]
    assert text_weights(first).samefile(text_weights(second)) == links
    assert "infinity-8b shares the text encoder of infinity-2b" in report.notices
    assert read_model_config(second)[2]["text_encoder"] == made
    assert read_origin(second).revisions[T5] == commit
    assert read_origin(second).reports["text_encoder"] == read_origin(first).reports["text_encoder"]
    shutil.rmtree(first)
    assert load_model(second, parts=TEXT).text_encoder is not None


def test_a_text_encoder_that_is_damaged_or_of_another_commit_is_not_shared(hub: Hub) -> None:
    first = provide_model("infinity-2b", parts=TEXT)
    content = text_weights(first).read_bytes()
    text_weights(first).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = provide_model("infinity-8b", parts=TEXT)
    assert text_weights(second).read_bytes() == content
    text_weights(first).write_bytes(content)
    shutil.rmtree(second / "text_encoder")
    write_origin(second, replace(read_origin(second), revisions={T5: "0" * 40}))
    with pytest.raises(InputError, match="has no revision 000000"):
        provide_model("infinity-8b", parts=TEXT)


def test_a_fixed_text_encoder_is_fetched_like_every_other_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a training, or for text features in a store: with progress, going on, checked, and not at all offline."""
    config = resolve("infinity-2b", overrides=SMALLER["infinity-2b"].overrides, environment={}).config.model
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=f"{T5} is not on this machine, and nothing is fetched offline"):
        find_text(config, Silent())
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    with pytest.raises(Interrupted, match=f"stopped by Ctrl-C while fetching {SHARD}"):
        find_text(config, Stops("fetching model-00001", 0.05))
    hub.asked.clear()
    found = find_text(config, Silent())
    (begun,) = hub.sent(SHARD)
    assert begun is not None
    assert begun.startswith("bytes=")
    folder = text_folder(T5)
    assert folder.is_relative_to(tmp_path / "hub")
    assert found.encoder == encoder_fingerprint(T5) == encoder_fingerprint(str(folder))
    hub.asked.clear()
    hub.status = 500
    encoder = load_text_encoder(T5, TEXT_LENGTH, torch.device("cpu"), torch.float32)
    assert hub.asked == []
    stored = weights_of_text_encoder()
    assert all(torch.equal(stored[name], value) for name, value in encoder.model.named_parameters())
    shutil.rmtree(tmp_path / "hub")
    hub.status, hub.damaged = 0, {SHARD}
    with pytest.raises(InputError, match=f"{SHARD} did not arrive whole"):
        load_text_encoder(T5, TEXT_LENGTH, torch.device("cpu"), torch.float32)


def test_the_text_encoder_of_a_model_is_there_for_stores_and_trainings(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_model_config(provide_model("infinity-2b", parts=TEXT))[0]
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_text(config, Silent()).width == 256
    assert hub.asked == []


def test_vocabularies_of_sentencepiece_alone_are_chosen_too() -> None:
    names = ["config.json", "spiece.model", "tokenizer_config.json", "pytorch_model.bin", "README.md"]
    chosen = any_text_encoder_files(names, Path)
    assert sorted(chosen) == sorted(names[:4])
    assert any_text_encoder_files([*names, "tokenizer.json"], Path) == [
        "config.json", "tokenizer.json", "pytorch_model.bin"
    ]  # fmt: skip


def test_a_training_begins_with_published_weights_by_name(hub: Hub) -> None:
    entry = SMALLER["infinity-2b"]
    config = resolve(entry.preset, overrides=entry.overrides, environment={}).config
    tokenizer, (found,) = first_tokenizer(config, Init(("infinity-2b",)), 0, Silent())
    assert torch.equal(
        tokenizer.state_dict()["autoencoder.encoder.conv_in.bias"],
        expected("tok_d32", torch.float32)["autoencoder.encoder.conv_in.bias"],
    )
    assert not found.mismatches()
    assert not hub.sent(MAIN)


# -- broken off --------------------------------------------------------------------------------------------------------


class Stops(Silent):
    """A user who presses Ctrl-C when a bar of that beginning has come that far, in megabytes."""

    def __init__(self, title: str, after: float = 0.0) -> None:
        super().__init__()
        self.title, self.after = title, after

    @contextmanager
    def task(self, title: str, total: float | None) -> Iterator[Task]:
        with super().task(title, total) as inner:
            if title.startswith(self.title):
                inner = _Counts(self.after)
            yield inner


class _Counts:
    def __init__(self, after: float) -> None:
        self.left = after

    def advance(self, amount: float = 1.0) -> None:
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt

    def status(self, text: str) -> None:
        pass


def test_a_download_that_breaks_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.breaks = [300_000, 200_000]
    provide_model("infinity-2b", parts=TOKENIZER)
    assert hub.sent(VAE) == [None, "bytes=300000-", "bytes=500000-"]
    hub.breaks, hub.ignores_ranges = [300_000], True
    folder = provide_model("infinity-2b", parts=TRANSFORMER)
    assert hub.sent(MAIN) == [None, "bytes=300000-"]
    assert is_model(folder)


def test_what_an_earlier_process_fetched_is_not_fetched_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = hub.files[REPOSITORY][VAE]
    blobs = tmp_path / "hub" / "models--FoundationVision--Infinity" / "blobs"
    with pytest.raises(Interrupted, match=f"stopped by Ctrl-C while fetching {VAE} .*goes on") as stopped:
        provide_model("infinity-2b", Stops("fetching infinity_vae", 0.5), TOKENIZER)
    assert stopped.value.exit_code == 130
    (partial,) = blobs.glob("*.incomplete")
    begun = partial.stat().st_size
    assert 0 < begun < len(data)
    assert data.startswith(partial.read_bytes())
    # a process that was killed leaves less than whole blocks, or more than there is
    with partial.open("r+b") as file:
        file.truncate(begun - 7)
    hub.asked.clear()
    with pytest.raises(Interrupted, match=f"while converting {REPOSITORY}/{VAE}"):
        provide_model("infinity-2b", Stops("converting the tokenizer"), TOKENIZER)
    assert hub.sent(VAE) == [f"bytes={begun - 7}-"]
    assert not list(blobs.glob("*.incomplete"))
    hub.asked.clear()
    provide_model("infinity-2b", parts=TOKENIZER)
    assert hub.sent(VAE) == []
    blob = blobs / etag(hub.files[REPOSITORY][MAIN])
    blob.with_name(blob.name + ".incomplete").write_bytes(b"x" * (len(hub.files[REPOSITORY][MAIN]) + 1))
    assert is_model(provide_model("infinity-2b", parts=TRANSFORMER))
    assert not list((tmp_path / "home").rglob("*.partial"))


def test_parts_that_are_made_stay_made(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=f"while fetching {MAIN}"):
        provide_model("infinity-2b", Stops("fetching infinity_2b"))
    folder = tmp_path / "home" / "models" / "infinity-2b"
    assert set(read_model_config(folder)[2]) == {"tokenizer"}
    made = (folder / "tokenizer.safetensors").stat().st_mtime_ns
    left = folder / ".transformer.safetensors.1.partial"
    left.write_bytes(b"of a killed process")
    assert is_model(provide_model("infinity-2b"))
    assert (folder / "tokenizer.safetensors").stat().st_mtime_ns == made
    assert not left.exists()


SECOND = """
    import sys
    from contextlib import contextmanager
    from bitgen_cli.report import Silent
    from bitgen_cli.runs.models import provide_model

    class Tells(Silent):
        def notice(self, text):
            print(text, flush=True)

        @contextmanager
        def task(self, title, total):
            print(title, flush=True)
            with super().task(title, total) as inner:
                yield inner

    provide_model(sys.argv[1], Tells(), ("tokenizer",))
"""


def test_of_two_processes_that_make_a_model_the_second_waits_and_uses_it(tmp_path: Path) -> None:
    file = write(tmp_path, {VAE: torch_file({"vae": weights_of("tok_d32")})}) / VAE
    words = [sys.executable, "-c", textwrap.dedent(SECOND), str(file)]
    with (
        only_writer(tmp_path / "home" / "models"),
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as second,
    ):
        assert second.stdout is not None
        assert second.stdout.readline() == "another process makes a model: waiting for it\n"
        folder = provide_model(str(file), parts=TOKENIZER)  # the first one is this process, whose lock that is
        made = (folder / "tokenizer.safetensors").stat().st_mtime_ns
        rest, _ = second.communicate(timeout=60)
    assert (second.returncode, rest) == (0, "")
    assert (folder / "tokenizer.safetensors").stat().st_mtime_ns == made


PROGRAM = """
    import signal, sys
    # as in a terminal: who runs the tests in a shell's background has Ctrl-C ignored, and so have their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:0] = [{folder!r}]
    from published_layouts import SMALLER
    from bitgen_cli.runs import published
    published.CATALOGUE.update(SMALLER)
    from huggingface_hub import constants
    constants.DOWNLOAD_CHUNK_SIZE = 50_000
    from bitgen_cli.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


def test_the_settings_of_the_hubs_client_hold_for_the_program(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own, as users have it: HF_ENDPOINT, HF_HOME, HF_TOKEN, a Ctrl-C, and the same command again."""
    from huggingface_hub import constants

    hub.token = "mine"
    hub.breaks = [200_000] * 50
    program = textwrap.dedent(PROGRAM).format(folder=str(Path(__file__).parent))
    words = [sys.executable, "-c", program, "tokenize", "world:2", str(tmp_path / "store")]
    words += ["--model", "infinity-2b", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "BITGEN_"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "BITGEN_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": "mine"}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as running:
        for _ in range(1200):
            if len(hub.sent(VAE)) > 1:
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert f"stopped by Ctrl-C while fetching {VAE}" in said
    (partial,) = (tmp_path / "hf" / "hub").rglob("*.incomplete")
    begun = partial.stat().st_size
    hub.breaks.clear()
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert main(words[3:]) == 0
    assert begun >= 200_000
    assert hub.sent(VAE) == [f"bytes={begun}-"]
    assert (tmp_path / "home" / "models" / "infinity-2b" / "tokenizer.safetensors").is_file()


# -- refused -----------------------------------------------------------------------------------------------------------


def test_no_network() -> None:
    with pytest.raises(InputError, match=r"cannot fetch FoundationVision/Infinity from http://127.0.0.1:9: ") as told:
        provide_model("infinity-2b")
    assert told.value.exit_code == 4
    assert told.value.hint == "check the network and run the same command again: it goes on where it stopped"


def test_offline_with_nothing_there(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "a cat", "--model", "infinity-2b", "--offline"]) == 4
    assert "FoundationVision/Infinity is not on this machine, and nothing is fetched offline" in capsys.readouterr().err
    assert hub.asked == []


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 403)])
def test_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, status: int) -> None:
    hub.token = "mine"
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=rf"does not let you read FoundationVision/Infinity \({status}\).*HF_TOKEN"):
        provide_model("infinity-2b")


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    lost = hub.files[REPOSITORY].pop(MAIN)
    with pytest.raises(InputError, match=f"has no {MAIN} at revision {hub.commit(REPOSITORY)[:12]}"):
        provide_model("infinity-2b")
    index = "infinity_8b_weights/pytorch_model.bin.index.json"
    del hub.files[REPOSITORY]["infinity_8b_weights/pytorch_model-00002-of-00002.bin"]
    with pytest.raises(InputError, match=r"has no infinity_8b_weights/pytorch_model-00002-of-00002\.bin"):
        provide_model("infinity-8b")
    hub.files[REPOSITORY][index] = json.dumps({"weight_map": {"a": "../../outside.bin"}}).encode()
    with pytest.raises(InputError, match="which is no weight file beside it"):
        provide_model("infinity-8b")
    hub.files[REPOSITORY][MAIN] = lost
    del hub.files[T5]
    with pytest.raises(InputError, match="has no google/flan-t5-xl"):
        provide_model("infinity-2b")
    hub.status = 503
    with pytest.raises(InputError, match="the hub answered 503"):
        provide_model("infinity-2b")


@pytest.mark.parametrize(("name", "parts"), [(VAE, TOKENIZER), ("config.json", ("text_encoder",))])
def test_wrong_bits_are_refused_and_fetched_again(hub: Hub, tmp_path: Path, name: str, parts: Sequence[str]) -> None:
    hub.damaged = {name}
    with pytest.raises(InputError, match=f"{name} did not arrive whole: its checksum is .*fetches it again"):
        provide_model("infinity-2b", parts=parts)
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    hub.damaged = set()
    assert provide_model("infinity-2b", parts=parts).is_dir()


def test_wrong_files_are_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    files, tokenizer = hub.files[REPOSITORY], dict(weights_of("tok_d32"))
    files[VAE] = torch_file({"vae": {**tokenizer, "extra.weight": torch.zeros(1)}})
    words = rf"not of this tokenizer \({REPOSITORY}/{VAE}\): unknown autoencoder\.extra\.weight"
    with pytest.raises(InputError, match=words):
        provide_model("infinity-2b", parts=TOKENIZER)
    assert not (tmp_path / "home" / "models" / "infinity-2b" / "tokenizer.safetensors").exists()
    shutil.rmtree(tmp_path / "home")
    files[VAE] = torch_file(weights_of("transformer_tiny"))
    with pytest.raises(InputError, match="is a transformer, not a tokenizer"):
        provide_model("infinity-2b", parts=TOKENIZER)
    shutil.rmtree(tmp_path / "home")
    files[VAE] = torch_file({"vae": tokenizer})
    files[MAIN] = torch_file({k: v for k, v in weights_of("transformer_tiny").items() if k != "head.bias"})
    with pytest.raises(InputError, match=r"missing head\.bias"):
        provide_model("infinity-2b", parts=TRANSFORMER)
    shutil.rmtree(tmp_path / "home")
    hub.files[T5]["config.json"] = json.dumps({"model_type": "bert"}).encode()
    with pytest.raises(InputError, match="does not describe a T5"):
        provide_model("infinity-2b", parts=("text_encoder",))


def test_a_full_disk_is_told_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 1_000_000))
    with pytest.raises(ResourceError, match=r"infinity-2b takes .* MB of disk .*1.0 MB are free .*HF_HOME") as told:
        provide_model("infinity-2b", parts=TOKENIZER)
    assert told.value.exit_code == 3
    assert hub.sent(VAE) == []


def test_names_that_are_nothing() -> None:
    with pytest.raises(InputError, match=r"no model at infinity-3b .*published ones are infinity-2b"):
        provide_model("infinity-3b")


# -- files of the user's own -------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def beside(folder: Path, tokenizer: str = "tok_d32") -> Path:
    """A folder with a tokenizer and a text encoder."""
    names = {"tok_d32": VAE, "tok_d14_f8": "infinity_vae_d56_f8_14_patchify.pth"}
    write(folder, {names[tokenizer]: torch_file({"vae": weights_of(tokenizer)})})
    write(folder / "flan-t5-xl", text_encoder())
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_takes_what_lies_beside_it_and_no_network(tmp_path: Path, dtype: torch.dtype) -> None:
    file = beside(tmp_path / "mine") / MAIN
    file.write_bytes(torch_file(weights_of("transformer_tiny", dtype)))
    folder = provide_model(str(file))
    assert is_model(folder)
    config, sampling, prints = read_model_config(folder)
    assert set(prints) == set(PARTS)
    assert (config.transformer.depth, config.transformer.heads, config.tokenizer.bits) == (4, 2, 32)
    assert config.transformer.text_length == TEXT_LENGTH
    assert sampling.cfg == 3
    assert load_model(folder).text_encoder is not None
    assert load_model(folder).revisions == {}
    # the tokenizer is the one that a training begun with the same file takes it for
    stored = {key: value.contiguous() for key, value in expected("tok_d32", torch.float32).items()}
    assert prints["tokenizer"] == hashlib.sha256(save(stored)).hexdigest()


def test_other_containers_and_names(tmp_path: Path) -> None:
    plain, patchified = weights_of("transformer_tiny"), weights_of("transformer_patchify")
    mine = beside(tmp_path / "mine")
    save_file(plain_blocks(plain), mine / "blocks.safetensors")
    assert is_model(provide_model(str(mine / "blocks.safetensors")))
    assert is_model(provide_model(str(mine)))  # the folder has one transformer
    write(mine, {VAE: torch_file({"vae": plain_tokenizer(weights_of("tok_d32"))})})
    assert is_model(provide_model(str(mine)))
    other = beside(tmp_path / "other", "tok_d14_f8")
    write(other, sharded(patchified, "safetensors", "infinity_8b_weights/"))
    for path in (other, other / "infinity_8b_weights", other / "infinity_8b_weights" / "model.safetensors.index.json"):
        folder = provide_model(str(path))
        assert is_model(folder, "transformer_patchify", "tok_d14_f8")
        assert read_model_config(folder)[0].transformer.patchify


def test_a_trainers_checkpoint_with_and_without_its_averages(tmp_path: Path) -> None:
    trained = weights_of("transformer_tiny")
    averaged = {key: value if value.dtype != torch.float32 else value * 0 for key, value in trained.items()}
    inner = {"config": {}, "vae_local": weights_of("tok_d32"), "gpt_fsdp": trained, "gpt_ema_fsdp": averaged}
    file = write(tmp_path, {"ar-ckpt.pth": torch_file({"epoch": 1, "trainer": inner})}) / "ar-ckpt.pth"
    write(tmp_path / "t5", text_encoder())
    folder = provide_model(str(file))
    assert is_model(folder)
    other = provide_model(f"{file}:ema")
    assert other != folder
    found = load_model(other, parts=TRANSFORMER).transformer
    assert found is not None
    assert not any(torch.any(value) for value in found.state_dict().values())


@pytest.mark.parametrize("rows", [TEXT_LENGTH - 8, TEXT_LENGTH + 8])
def test_unconditional_prompts_of_another_length(hub: Hub, rows: int) -> None:
    whole = weights_of("transformer_tiny")
    prompt = whole["cfg_uncond"]
    longer = torch.cat((prompt, prompt))[:rows]
    hub.files[REPOSITORY][MAIN] = torch_file({**whole, "cfg_uncond": longer})
    folder = provide_model("infinity-2b", parts=TRANSFORMER)
    found = load_model(folder, parts=TRANSFORMER).transformer
    assert found is not None
    assert found.null_text.shape == (TEXT_LENGTH, 256)
    kept = min(rows, TEXT_LENGTH)
    assert torch.equal(found.null_text[:kept], longer[:kept].bfloat16().float())
    assert (found.null_text[kept:].abs().sum(1) > 0).all()
    assert read_origin(folder).reports["transformer"]["adapted"] == {"null_text": f"{rows} rows to {TEXT_LENGTH}"}


def test_a_file_that_changes_is_another_model(tmp_path: Path) -> None:
    file = write(tmp_path, {VAE: torch_file({"vae": weights_of("tok_d32")})}) / VAE
    folder = provide_model(str(file), parts=TOKENIZER)
    first = sha256(folder / "tokenizer.safetensors")
    assert read_model_config(folder)[2] == {"tokenizer": first}
    whole = weights_of("tok_d32")
    changed = {key: value + 1 if value.is_floating_point() else value for key, value in whole.items()}
    write(tmp_path, {VAE: torch_file({"vae": changed})})
    os.utime(file, ns=(0, 0))
    assert provide_model(str(file), parts=TOKENIZER) == folder
    assert sha256(folder / "tokenizer.safetensors") != first
    with pytest.raises(UsageError, match="is a tokenizer alone"):
        provide_model(str(file))


def test_what_no_model_can_be_made_of(tmp_path: Path) -> None:
    file = write(tmp_path / "a", {MAIN: torch_file(weights_of("transformer_tiny"))}) / MAIN
    with pytest.raises(InputError, match="no tokenizer beside"):
        provide_model(str(file))
    write(tmp_path / "a", {VAE: torch_file({"vae": weights_of("tok_d32")})})
    with pytest.raises(InputError, match="no text encoder of 256 channels beside"):
        provide_model(str(file))
    write(tmp_path / "a", {"second.pth": file.read_bytes()})
    with pytest.raises(InputError, match=f"holds 2 models: {MAIN}, second.pth"):
        provide_model(str(tmp_path / "a"))
    lost = {key: value for key, value in weights_of("transformer_tiny").items() if key != "cfg_uncond"}
    file = write(beside(tmp_path / "c"), {MAIN: torch_file(lost)}) / MAIN
    with pytest.raises(InputError, match=r"no transformer of a geometry that bitgen knows: 'null_text'"):
        provide_model(str(file))
    (tmp_path / "c" / VAE).rename(tmp_path / "c" / "vae-other.pth")
    write(tmp_path / "c", {"vae-d64.pth": torch_file({"vae": weights_of("tok_d64")})})
    assert is_model(
        provide_model(str(write(tmp_path / "c", {MAIN: torch_file(weights_of("transformer_tiny"))}) / MAIN))
    )
    empty = write(tmp_path / "b", {"x.pth": torch_file({"pos_start": torch.zeros(1, 1, 8)})}) / "x.pth"
    with pytest.raises(InputError, match="embedding of bits is missing"):
        provide_model(str(empty))


def test_the_catalogue_is_what_the_presets_describe() -> None:
    for name, entry in AS_PUBLISHED.items():
        config = resolve(entry.preset, overrides=entry.overrides, environment={}).config
        digits = "".join(character for character in name if character.isdigit())
        if entry.transformer is None:
            assert config.model.tokenizer.bits == int(digits)
        else:
            assert config.name == name
