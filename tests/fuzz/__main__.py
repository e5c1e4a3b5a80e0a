"""`python -m tests.fuzz`: many hostile inputs for every reader, and figures.

Each reader has a process of its own with a limit of memory, so that one that dies takes no other with it. Inputs that
fail are kept: `--again FILE --reader NAME` tries one of them again.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MEMORY = 2048
"""MiB that a reader may need beyond what it has when it begins: pictures have up to 89 million pixels."""
AT_ONCE = 500
"""Inputs of one search of hypothesis, which remembers them all."""
LONGEST = 300
"""Seconds after which a process that reads one input is ended."""
COLUMNS = "{:<20} {:>8} {:>9} {:>8} {:>9} {:>9} {:>10}"


def main(arguments: list[str]) -> int:
    """1 where an input failed, else 0."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="hostile inputs for every reader of bitgen")
    parser.add_argument("--inputs", type=int, default=100_000, help="in all; readers have shares of them")
    parser.add_argument("--reader", action="append", help="only this one; may be given several times")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other inputs")
    parser.add_argument("--memory", type=int, default=MEMORY, help="MiB that a reader may need")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder of inputs that fail")
    parser.add_argument("--atheris", action="store_true", help="search by coverage; needs atheris")
    parser.add_argument("--again", type=Path, metavar="FILE", help="try one kept input of --reader")
    options = parser.parse_args(arguments)
    options.keep = options.keep.resolve()
    options.again = options.again and options.again.resolve()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as place:
        os.environ["BITGEN_HOME"] = os.environ["HF_HOME"] = f"{place}/home"
        with _instrumented(options.atheris):
            from readers import READERS
        unknown = set(options.reader or ()) - READERS.keys()
        if unknown:
            parser.error(f"no reader {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
        chosen = options.reader or list(READERS)
        whole = sum(READERS[name].share for name in chosen)
        shares = {name: round(options.inputs * READERS[name].share / whole) for name in chosen}
        print(COLUMNS.format("reader", "inputs", "accepted", "refused", "failures", "slowest", "memory"), flush=True)
        found = list(_all({name: count for name, count in shares.items() if count}, Path(place), options))
    total = {key: sum(one[key] for one in found) for key in ("inputs", "accepted", "refused", "failures")}
    worst = {key: max(one[key] for one in found) for key in ("slowest", "memory")}
    _print_line("all", total | worst)
    return int(total["failures"] > 0)


def _all(shares: dict[str, int], place: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures of each reader, from a process of its own that knows all that is imported here."""
    fork = get_context("fork")
    waiting, running = list(shares), {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            folder = _made(place / f"reader-{len(waiting)}")
            process = fork.Process(target=work, args=(name, shares[name], folder, options))
            process.start()
            running[process.sentinel] = name, folder, process
        for sentinel in wait(list(running)):
            name, folder, process = running.pop(sentinel)
            process.join()
            figures = _figures(name, shares[name], folder, process.exitcode, options.keep)
            shutil.rmtree(folder)
            _print_line(name, figures)
            for line in figures["told"]:
                print(f"    {line}", flush=True)
            yield figures


def _figures(name: str, count: int, folder: Path, code: int | None, keep: Path) -> dict[str, Any]:
    """What a process left; of one that died, what it read last."""
    if (folder / "result.json").is_file():
        figures: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return figures
    data = folder / "box" / "data"
    found = [file for file in data.rglob("*") if file.is_file()]
    last = max(found, key=lambda file: file.stat().st_mtime_ns, default=None)
    kept = "nothing" if last is None else _keep(keep, name, last.read_bytes())
    told = [f"its process ended with {code}; it read {kept} last"]
    return dict.fromkeys(("accepted", "refused", "slowest", "memory"), 0) | {
        "inputs": count,
        "failures": 1,
        "told": told,
    }


def work(name: str, count: int, place: Path, options: argparse.Namespace) -> None:
    """Tries inputs on one reader, and leaves its figures in a file."""
    from readers import READERS, Prepared

    prepared = Prepared.of(READERS[name], _made(place / "box"))
    os.chdir(prepared.box.here)
    figures: dict[str, Any] = dict.fromkeys(("inputs", "accepted", "refused", "failures"), 0)
    known: set[str] = set()
    figures |= {"slowest": 0.0, "told": []}
    start = _peak()
    _limit_memory(options.memory)

    def test(content: bytes) -> None:
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        outcome = prepared.attempt(content)
        faulthandler.cancel_dump_traceback_later()
        figures["inputs"] += 1
        figures["slowest"] = max(figures["slowest"], outcome.seconds)
        if outcome.failure is not None:
            figures["failures"] += 1
            kind = outcome.failure.partition(": ")[0] + outcome.failure.rpartition(" at ")[2]
            if kind not in known:
                known.add(kind)
                figures["told"].append(f"{outcome.failure} ({_keep(options.keep, name, content)})")
        else:
            figures["refused" if outcome.refused else "accepted"] += 1

    def finish() -> None:
        figures["memory"] = max(0, _peak() - start)
        (place / "result.json").write_text(json.dumps(figures))

    if options.again is not None:
        test(options.again.read_bytes())
    elif options.atheris:
        _by_coverage(test, finish, prepared, count, place)
    else:
        _by_chance(test, prepared, count, options.seed)
    finish()


def _instrumented(wanted: bool) -> AbstractContextManager[object]:
    """Inside, what is imported tells atheris which of its lines are reached."""
    if not wanted:
        return nullcontext()
    import atheris

    return atheris.instrument_imports(include=["bitgen_cli"])


def _by_chance(test: Callable[[bytes], None], prepared: Any, count: int, seed: int) -> None:
    """Inputs that hypothesis draws."""
    import hypothesis

    for number, first in enumerate(range(0, count, AT_ONCE)):
        few = hypothesis.settings(
            max_examples=min(AT_ONCE, count - first),
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        search = hypothesis.given(prepared.inputs())(lambda content: test(content))
        hypothesis.seed(hash((seed, number)))(few(search))()


def _by_coverage(
    test: Callable[[bytes], None], finish: Callable[[], None], prepared: Any, count: int, place: Path
) -> None:
    """Inputs that atheris makes of valid ones, led by the lines they reach. It ends the process itself."""
    import atheris

    corpus = _made(place / "corpus")
    for number, seed in enumerate(prepared.seeds):
        (corpus / str(number)).write_bytes(seed)
    done = 0

    def counted(content: bytes) -> None:
        nonlocal done
        done += 1
        test(content)
        if done >= count:
            finish()
            os._exit(0)

    atheris.Setup([sys.argv[0], f"-runs={10 * count}", "-max_len=65536", "-rss_limit_mb=0", str(corpus)], counted)
    atheris.Fuzz()


def _print_line(name: str, figures: dict[str, Any]) -> None:
    counts = [figures[key] for key in ("inputs", "accepted", "refused", "failures")]
    print(COLUMNS.format(name, *counts, f"{figures['slowest']:.2f} s", f"{figures['memory']} MiB"), flush=True)


def _keep(folder: Path, name: str, content: bytes) -> Path:
    """Writes an input that failed."""
    file = folder / f"{name.replace(' ', '-')}-{hashlib.sha256(content).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _peak() -> int:
    """MiB of memory that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _limit_memory(mebibytes: int) -> None:
    """Lets this process have only so much more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
