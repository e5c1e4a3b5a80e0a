"""Files of the Hugging Face hub: found on this machine, or fetched, checked and kept there.

They lie where the hub's own client keeps them, so that other programs have them too; where that is, which hub it is and
who asks are its settings: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. The client forgets what was fetched of a file
when its process ends. Here the bytes stay under the file's name with `.incomplete` behind it and the next process goes
on with them.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitgen_cli.engine.vocabulary import SENTENCE_PIECE, VOCABULARY_FILE
from bitgen_cli.engine.weight_files import FOLDER_NAMES, INDEX_SUFFIX, shard_names
from bitgen_cli.errors import BitgenError, InputError, Interrupted
from bitgen_cli.files import explain, taking_turns, write_text
from bitgen_cli.report import Report, Silent

OFFLINE = "HF_HUB_OFFLINE"
"""Environment variable: 1 asks nothing of the network."""
MAIN = "main"
"""The revision that a repository is read at unless another one is named."""
INCOMPLETE = ".incomplete"
MEGABYTE = 1e6

Choose = Callable[[Collection[str], Callable[[str], Path]], list[str]]
"""The names that are needed of those that a repository has; the second argument gives one of its files to read."""

_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")
_ETAG = re.compile(r"[\w.-]{1,200}")
_HTTP = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Libraries the hub's client has spoken through."""
_AGAIN = 1.0
"""Seconds after which a broken connection is tried again."""


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository.

    Attributes:
        repository: OWNER/NAME.
        commit: 40 hexadecimal digits.
        files: names of those that are needed, and their bytes.
        etags: what the hub calls their contents by, where it was asked.
    """

    repository: str
    commit: str
    files: Mapping[str, int]
    etags: Mapping[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Where a file is kept, or will be."""
        return _folder(self.repository) / "snapshots" / self.commit / name

    @property
    def missing(self) -> dict[str, int]:
        """Names of the files that are not on this machine, and the bytes still to fetch of each."""
        return {name: size - self._begun(name) for name, size in self.files.items() if not self.path(name).is_file()}

    def _begun(self, name: str) -> int:
        """Bytes of a file that an earlier process has fetched."""
        etag = self.etags.get(name, "")
        partial = _folder(self.repository) / "blobs" / (etag + INCOMPLETE)
        return partial.stat().st_size if etag and partial.is_file() else 0


def is_offline() -> bool:
    """Whether nothing may be asked of the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def one_file(name: str) -> Choose:
    """Chooses one file."""
    return lambda names, read: [name]


def sharded(folder: str) -> Choose:
    """Chooses the weights of a folder of the repository: one file, or an index with all of its shards."""
    start = f"{folder}/" if folder else ""

    def choose(names: Collection[str], read: Callable[[str], Path]) -> list[str]:
        indices = sorted(name for name in names if name.startswith(start) and name.endswith(INDEX_SUFFIX))
        here = [start + name for name in FOLDER_NAMES if start + name in names] + indices
        found = (here or [start + FOLDER_NAMES[0]])[0]
        if not here or not found.endswith(INDEX_SUFFIX):
            return [found]
        return [found, *(start + shard for shard in shard_names(read(found)))]

    return choose


def text_encoder_files(names: Collection[str], read: Callable[[str], Path]) -> list[str]:
    """Chooses what a text encoder is read from."""
    return ["config.json", VOCABULARY_FILE, *sharded("")(names, read)]


def any_text_encoder_files(names: Collection[str], read: Callable[[str], Path]) -> list[str]:
    """Chooses what transformers reads a text encoder from, also where its vocabulary is SentencePiece's alone."""
    if VOCABULARY_FILE in names or SENTENCE_PIECE not in names:
        return text_encoder_files(names, read)
    beside = [name for name in ("special_tokens_map.json", "tokenizer_config.json") if name in names]
    return ["config.json", SENTENCE_PIECE, *beside, *sharded("")(names, read)]


def provided(repository: str, choose: Choose, report: Report) -> Snapshot:
    """The files on this machine; those that are not are fetched first, and known from then on.

    Args:
        repository, choose: as in `kept`.
        report: as in `fetch`.

    Raises: as `offered` and `fetch`.
    """
    snapshot = kept(repository, MAIN, choose)
    if snapshot is None:
        snapshot = offered(repository, MAIN, choose)
        fetch(snapshot, report)
        remember(snapshot)
    return snapshot


def remember(snapshot: Snapshot) -> None:
    """Makes a commit whose files are there the one that is found where none is named, as the hub's client does.

    Raises:
        InputError, ResourceError: it cannot be written.
    """
    write_text(_folder(snapshot.repository) / "refs" / MAIN, snapshot.commit)


def kept(repository: str, revision: str, choose: Choose) -> Snapshot | None:
    """The files as they are on this machine; None where one is missing. Nothing is asked of the network.

    Args:
        repository: OWNER/NAME.
        revision: commit, branch or tag.
        choose: which files.
    """
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (_folder(repository) / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    folder = Snapshot(repository, commit, {}).path("")
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    wanted = choose(sizes, folder.joinpath)
    if not sizes.keys() >= set(wanted):
        return None
    return Snapshot(repository, commit, {name: sizes[name] for name in wanted})


def offered(repository: str, revision: str, choose: Choose) -> Snapshot:
    """The files as the hub has them; fetches none but an index that names others.

    Args:
        repository, revision, choose: as in `kept`.

    Raises:
        InputError: offline, the hub cannot be reached, does not let the user in, or has no such file.
    """
    from huggingface_hub import HfApi

    if is_offline():
        raise InputError(
            f"{repository} is not on this machine, and nothing is fetched offline",
            f"leave --offline and {OFFLINE} away once, or copy the files here and name their folder",
        )
    with _told(repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    commit = str(info.sha)
    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    sizes = {name: int(file.size or 0) for name, file in files.items()}

    def read(name: str) -> Path:
        snapshot = Snapshot(repository, commit, {name: sizes[name]})
        fetch(snapshot, Silent())
        return snapshot.path(name)

    wanted = choose(sizes, read)
    lacking = sorted(set(wanted) - sizes.keys())
    if lacking:
        raise _no_such_file(repository, commit, ", ".join(lacking[:4]))
    etags = {name: str(file.lfs.sha256 if file.lfs else file.blob_id) for name, file in files.items()}
    return Snapshot(repository, commit, {n: sizes[n] for n in wanted}, {n: etags[n] for n in wanted})


def fetch(snapshot: Snapshot, report: Report) -> None:
    """Fetches what is missing of the files, one after the other; what an earlier process began goes on.

    One process fetches of a repository at a time: the others wait, and have it then.

    Args:
        snapshot: which files.
        report: gets a bar for each, in megabytes.

    Raises:
        InputError: the hub cannot be reached, does not let the user in, or a file is not what it says it is.
        ResourceError: no space left; what was fetched stays.
        Interrupted: stopped by the user; what was fetched stays.
    """
    if not snapshot.missing:
        return
    place = cache_folder() / ".locks" / _folder(snapshot.repository).name
    with taking_turns(place, lambda: report.notice(f"another process fetches {snapshot.repository}: waiting for it")):
        for name in snapshot.missing:
            try:
                _fetch(snapshot, name, report)
            except KeyboardInterrupt as error:
                raise Interrupted(
                    f"stopped by Ctrl-C while fetching {name}",
                    "what was fetched stays; the same command goes on with it",
                ) from error


# -- one file ----------------------------------------------------------------------------------------------------------


class _Counting(io.BufferedRandom):
    """A file that tells how many bytes are written into it; it is at its end to begin with."""

    def __init__(self, file: Path, told: Callable[[int], None]) -> None:
        file.touch()
        super().__init__(io.FileIO(file, "r+"))
        self._told = told
        self.seek(0, os.SEEK_END)

    def write(self, data: Any) -> int:
        self._told(len(data))
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        before = os.fstat(self.fileno()).st_size
        left = super().truncate(size)
        self._told(left - before)
        return left


def _fetch(snapshot: Snapshot, name: str, report: Report) -> None:
    """Fetches one file and has the client put it into its place."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(snapshot.repository, name, revision=snapshot.commit)
    with _told(snapshot.repository, snapshot.commit, name):
        metadata = get_hf_file_metadata(url)
    etag = metadata.etag or ""
    if not _ETAG.fullmatch(etag) or metadata.size is None:
        raise InputError(f"the hub does not say what {snapshot.repository}/{name} is", "is HF_ENDPOINT a hub?")
    blob = _folder(snapshot.repository) / "blobs" / etag
    if not blob.exists():
        partial = blob.with_name(etag + INCOMPLETE)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            if partial.is_file() and partial.stat().st_size > metadata.size:
                partial.unlink()
            _download(url, partial, metadata.size, snapshot, name, report)
            _check(partial, etag, metadata.size, f"{snapshot.repository}/{name}", report)
            partial.replace(blob)
        except OSError as error:
            raise explain(error, partial, "write") from error
    with _told(snapshot.repository, snapshot.commit, name):
        hf_hub_download(snapshot.repository, name, revision=snapshot.commit)


def _download(url: str, partial: Path, size: int, snapshot: Snapshot, name: str, report: Report) -> None:
    """Appends to a file what it lacks; a connection that breaks is made again as long as something comes.

    Raises:
        InputError: what the hub says.
        OSError: the file cannot be written.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    with (
        report.task(f"fetching {name} (MB)", round(size / MEGABYTE, 1)) as task,
        _Counting(partial, lambda count: task.advance(count / MEGABYTE)) as file,
    ):
        begun = file.tell()
        if begun:
            task.advance(begun / MEGABYTE)
        disable_progress_bars()
        while begun < size:
            try:
                with _told(snapshot.repository, snapshot.commit, name):
                    http_get(url, file, resume_size=begun, headers=headers, expected_size=size)
                break
            except _Unreachable:
                reached = file.seek(0, os.SEEK_END)
                if not begun < reached <= size:
                    raise
                begun = reached
                time.sleep(_AGAIN)


def _check(file: Path, etag: str, size: int, what: str, report: Report) -> None:
    """Compares a file with what the hub calls it by: the sha256 of large files, git's sha1 of small ones.

    Raises:
        InputError: it is another one; it is deleted.
    """
    found = file.stat().st_size
    is_large = _SHA256.fullmatch(etag) is not None
    problem = f"{found} bytes, not {size}" if found != size else ""
    if not problem and (is_large or _COMMIT.fullmatch(etag)):
        digest = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % size)
        with (
            report.task(f"checking {Path(what).name} (MB)", round(size / MEGABYTE, 1)) as task,
            file.open("rb") as data,
        ):
            while block := data.read(1 << 22):
                digest.update(block)
                task.advance(len(block) / MEGABYTE)
        if digest.hexdigest() != etag:
            problem = f"its checksum is {digest.hexdigest()[:12]}..., not {etag[:12]}..."
    if problem:
        file.unlink()
        raise InputError(f"{what} did not arrive whole: {problem}", "it was deleted; the same command fetches it again")


def cache_folder() -> Path:
    """Where the hub's client keeps everything."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(repository: str) -> Path:
    """Where the hub's client keeps a repository."""
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=repository, repo_type="model")


# -- what can go wrong -------------------------------------------------------------------------------------------------


class _Unreachable(InputError):
    """The hub cannot be reached, or a connection broke."""


@contextmanager
def _told(repository: str, revision: str, name: str = "") -> Iterator[None]:
    """Turns what the hub's client raises in the block into one line for the user."""
    try:
        yield
    except Exception as error:
        told = _explained(error, repository, revision, name)
        if told is None:
            raise
        raise told from error


def _explained(error: Exception, repository: str, revision: str, name: str) -> BitgenError | None:
    """The error for the user; None for those that have nothing to do with the hub."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{repository} is no name that a repository of the hub can have")
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return InputError(
            f"the hub does not let you read {repository} ({status})",
            f"accept its terms at {constants.ENDPOINT}/{repository} and set HF_TOKEN to a token of yours",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repository} has no revision {revision}", "leave it away, or name a commit, branch or tag")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return _no_such_file(repository, revision, name)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return InputError(f"the hub at {constants.ENDPOINT} has no {repository}", "is HF_ENDPOINT right?")
    if status is not None:
        return InputError(f"the hub answered {status} when asked for {repository}", "try again later")
    from_client = type(error).__module__.split(".")[0] in _HTTP
    told = isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError)
    broke = isinstance(error, OSError) and str(error).startswith("Consistency check failed")
    if from_client or told or broke or isinstance(error, ConnectionError | TimeoutError):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        wanted = f"{repository}/{name}" if name else repository
        return _Unreachable(
            f"cannot fetch {wanted} from {constants.ENDPOINT}: {reason}",
            "check the network and run the same command again: it goes on where it stopped",
        )
    return None


def _no_such_file(repository: str, revision: str, name: str) -> InputError:
    return InputError(
        f"{repository} has no {name} at revision {revision[:12]}", "another revision may: --model NAME@REVISION"
    )
