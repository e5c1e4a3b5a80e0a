"""`bitgen sample --prompts`: manifests, jobs that go on, lines that fail, and processes that share the lines."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processes import finish, start, start_ranks

from bitgen_cli.errors import InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import drawing, output
from bitgen_cli.runs import sample as walk
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.sample import sample
from bitgen_cli.runs.sample_result import SampleResult

pytestmark = pytest.mark.usefixtures("here")


def lines(count: int) -> None:
    """A prompt file of that many lines, of two shapes, some of which ask for two pictures."""
    rows = [
        f"a red dog number {n}" if n % 3 else json.dumps({"prompt": f"moon {n}", "num_images": 2, "aspect": "1:2"})
        for n in range(count)
    ]
    Path("p.jsonl").write_text("\n".join(rows) + "\n")


def run(model: str, report: Silent | None = None, **options: Any) -> SampleResult:
    given = {"prompts_file": "p.jsonl", "output": "out/", **options}
    return sample(SampleOptions(model=model, **given), report or Silent())


def rows(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "manifest.jsonl").read_text().splitlines()]


def contents(folder: str = "out") -> dict[str, bytes]:
    found = {}
    for file in sorted(Path(folder).rglob("*.png")):
        with Image.open(file) as image:
            found[file.name] = image.tobytes()
    return found


def test_every_picture_has_a_line_in_the_manifest(model: str) -> None:
    lines(7)
    result = run(model, seed=3)
    found = rows()
    assert len(found) == len(result.pictures) == 10
    assert result.manifest == Path("out/manifest.jsonl")
    told = {str(picture.path): picture for picture in result.pictures}
    for row in found:
        picture = told[f"out/{row['file']}"]
        assert (row["prompt"], row["seed"], row["recipe"]) == (picture.prompt, picture.seed, picture.recipe)
        assert row["recipe"]["seed"] == row["seed"]
    assert sorted((row["line"], row["number"]) for row in found)[:3] == [(1, 0), (1, 1), (2, 0)]


def test_pictures_are_those_of_one_at_a_time_and_of_any_order(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(8)
    run(model, seed=3, batch_size=8)
    monkeypatch.setattr(walk, "AHEAD", 3)
    run(model, seed=3, batch_size=1, output="alone/")
    assert contents("alone") == contents()
    text = Path("p.jsonl").read_text().splitlines()
    Path("p.jsonl").write_text("\n".join(reversed(text)))
    run(model, seed=3, batch_size=2, output="turned/")
    assert contents("turned") == contents()


def test_pictures_are_named_as_soon_as_they_are_there(model: str) -> None:
    lines(4)
    seen: list[int] = []

    def look(picture: object) -> None:
        seen.append(len(contents()))

    sample(SampleOptions(model=model, prompts_file="p.jsonl", output="out/", batch_size=1, seed=1), Silent(), look)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_the_same_call_again_draws_nothing_and_other_options_draw_anew(model: str) -> None:
    lines(4)
    first = run(model)
    before, listed = contents(), rows()
    report = Silent()
    again = run(model, report)
    assert (again.pictures, again.kept) == ([], len(first.pictures))
    assert (contents(), rows()) == (before, listed)
    assert "6 pictures of p.jsonl are there already" in report.notices
    assert len(run(model, cfg="1").pictures) == 6
    assert len(run(model, num_images=2).pictures) == 2  # one more for each line that does not say
    Path("p.jsonl").write_text("another\n" + "\n".join(Path("p.jsonl").read_text().splitlines()[1:]))
    assert [picture.prompt for picture in run(model).pictures] == ["another"]


def test_a_grid_shows_what_was_there_too(model: str) -> None:
    Path("p.jsonl").write_text("a dog\na cat\nthe moon\n")
    whole = run(model, seed=1, grid=True).grid
    Path("out/a-cat-1.png").unlink()
    again = run(model, seed=1, grid=True)
    assert [picture.path.name for picture in again.pictures] == ["a-cat-1.png"]
    assert (whole, again.grid) == (Path("out/grid.png"), Path("out/grid-2.png"))
    assert contents()["grid.png"] == contents()["grid-2.png"]
    assert run(model, seed=1, grid=True).grid is None, "there is one of all of them"
    Path("out/grid.png").unlink()
    assert run(model, seed=1, grid=True).grid == whole, "a call that was stopped before it could write one"


def test_pictures_of_several_sizes_are_refused_for_a_grid_before_any_is_drawn(model: str) -> None:
    Path("p.jsonl").write_text('a dog\n{"prompt": "a cat", "aspect": "1:2"}\n')
    with pytest.raises(UsageError, match="pictures of one size"):
        run(model, grid=True)
    assert contents() == {}


def test_a_picture_that_is_gone_is_drawn_again_by_its_seed(model: str) -> None:
    lines(4)
    run(model)
    before, listed = contents(), rows()
    gone = Path("out") / rows()[0]["file"]
    gone.unlink()
    again = run(model)
    assert [picture.path for picture in again.pictures] == [gone]
    assert (contents(), rows()) == (before, listed)


def test_a_line_keeps_its_seeds_where_its_first_picture_is_not_listed(model: str) -> None:
    Path("p.jsonl").write_text('{"prompt": "a dog", "num_images": 2}\n')
    run(model)
    before, (first, second) = contents(), rows()
    Path("out/manifest.jsonl").write_text(json.dumps(second) + "\n")
    (Path("out") / first["file"]).unlink()
    assert [picture.seed for picture in run(model).pictures] == [first["seed"]]
    assert contents() == before


def test_overwrite_begins_anew(model: str) -> None:
    lines(3)
    run(model, seed=1)
    names = set(contents())
    Path("out/manifest.jsonl").write_text("")
    assert not {picture.path.name for picture in run(model, seed=1).pictures} & names
    again = run(model, seed=1, overwrite=True)
    assert {picture.path.name for picture in again.pictures} == names
    assert len(rows()) == len(names)


def test_no_picture_replaces_the_manifest(model: str) -> None:
    named = {"prompt": "a", "output": "manifest.jsonl"}, {"prompt": "manifest", "output": "{prompt}.jsonl"}
    Path("p.jsonl").write_text("\n".join(map(json.dumps, named)))
    for _ in range(2):
        result = run(model, overwrite=True)
        assert [failure.line for failure in result.failures] == [1]
        assert [row["file"] for row in rows()] == ["manifest-2.jsonl"]


def test_stdout_gets_nothing_where_no_line_can_be_drawn(model: str) -> None:
    Path("p.jsonl").write_text("{}\n")
    result = run(model, output="-")
    assert result.png is None
    assert [failure.line for failure in result.failures] == [1]


def test_a_torn_or_foreign_manifest_is_survived(model: str) -> None:
    lines(3)
    run(model, seed=1)
    before = contents()
    whole = Path("out/manifest.jsonl").read_text().splitlines()
    evil = json.loads(whole[0]) | {"file": "../../p.jsonl"}
    Path("out/manifest.jsonl").write_text("\n".join(["[]", "{}", json.dumps(evil), *whole[1:-1], whole[-1][:20]]))
    again = run(model, seed=1)
    assert len(again.pictures) == 2
    assert all(picture.path.name.endswith("-2.png") for picture in again.pictures)
    assert {name: data for name, data in contents().items() if name in before} == before
    assert run(model, seed=1).pictures == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": 3}', "prompt cannot be"),
        ('{"seed": 1}', "needs a prompt"),
        ('{"prompt": "  "}', "prompt is empty"),
        ('{"prompt": "a", "sed": 1}', "unknown key 'sed'"),
        ('{"prompt": ', "not valid JSON"),
        ("{" * 100_000, "not valid JSON"),
        ('{"prompt": "a", "x": ' + "[" * 100_000, "not valid JSON"),
        ('{"prompt": "a", "num_images": 0}', "num_images"),
        ('{"prompt": "a", "num_images": 999999999}', "num_images"),
        ('{"prompt": "a", "seed": 99999999999999999999999}', "64 bits"),
        ('{"prompt": "a", "cfg": NaN}', "cfg"),
        ('{"prompt": "a", "cfg": [1, "x"]}', "not a number"),
        ('{"prompt": "a", "aspect": "wide"}', "W:H"),
        ('{"prompt": "a \\ud800 dog"}', "halves of characters"),
        ('{"prompt": "a [V] dog"}', r"\[V\]"),
        ('{"prompt": "a", "output": "../x.png"}', "leads out"),
        ('{"prompt": "a", "output": "/tmp/x.png"}', "leads out"),
        ('{"prompt": "a", "output": "link/x.png"}', "leads out"),
        ('{"prompt": "a", "output": "a\\u0000b.png"}', "cannot be a path"),
        ('{"prompt": "a", "output": "{seed:>9999999999}.png"}', "its name alone"),
        ('{"prompt": "a", "output": "{seed}/../../../x.png"}', "leads out"),
        ('{"prompt": "a", "output": "there.png"}', "there already"),
        ('{"prompt": "a", "output": "x.png", "num_images": 2}', "one file for 2"),
        ('{"prompt": "a", "output": "good.png"}', "another line"),
        ('{"prompt": "a", "output": "manifest.jsonl"}', "another name"),
        ('{"prompt": "a", "output": "./sub/../manifest.jsonl"}', "leads out"),
        ('{"prompt": "a", "output": "there.png/x.png"}', "there.png"),
    ],
)
def test_a_bad_line_does_not_stop_the_others(model: str, here: Path, line: str, says: str) -> None:
    Path("out").mkdir()
    Path("out/link").symlink_to("/tmp")
    Path("out/there.png").write_bytes(b"mine")
    Path("p.jsonl").write_text(f'\n{{"prompt": "a dog", "output": "good.png"}}\n{line}\na cat\n')
    result = run(model, seed=1)
    assert sorted(str(picture.path) for picture in result.pictures) == ["out/a-cat-1.png", "out/good.png"]
    (failure,) = result.failures
    assert failure.line == 3
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(failure.message)
    assert result.to_json()["failed"] == [{"line": 3, "error": failure.message}]
    assert Path("out/there.png").read_bytes() == b"mine"


def test_a_picture_that_cannot_be_written_is_a_failed_line_and_a_full_disk_the_end(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.jsonl").write_text("a dog\na cat\nthe moon\n")
    write = output.write_picture

    def fail(path: Path, *rest: Any) -> None:
        if "cat" in path.name:
            raise InputError(f"cannot write {path}: permission denied")
        write(path, *rest)

    monkeypatch.setattr(walk, "write_picture", fail)
    result = run(model, seed=1)
    assert [(failure.line, failure.message[:12]) for failure in result.failures] == [(2, "cannot write")]
    assert len(contents()) == 2
    monkeypatch.setattr(walk, "write_picture", write)
    assert [str(picture.path) for picture in run(model, seed=1).pictures] == ["out/a-cat-1.png"]

    def full(*_: object) -> None:
        raise ResourceError("no space left")

    monkeypatch.setattr(walk, "write_picture", full)
    with pytest.raises(ResourceError):
        run(model, seed=2)


def test_a_name_that_is_taken_while_others_are_drawn_is_a_failed_line(model: str) -> None:
    Path("p.jsonl").write_text('a dog\n{"prompt": "a cat", "output": "mine.png"}\nthe moon\n')

    def take(picture: object) -> None:
        Path("out/mine.png").write_bytes(b"mine")

    call = SampleOptions(model=model, prompts_file="p.jsonl", output="out/", batch_size=1, seed=1)
    result = sample(call, Silent(), take)
    assert [(failure.line, "is there already" in failure.message) for failure in result.failures] == [(2, True)]
    assert [picture.path.name for picture in result.pictures] == ["a-dog-1.png", "the-moon-1.png"]
    assert Path("out/mine.png").read_bytes() == b"mine"
    assert [row["line"] for row in rows()] == [1, 3]


def test_an_option_that_no_line_says_is_told_before_anything_is_drawn(model: str) -> None:
    lines(3)
    with pytest.raises(UsageError, match="one file for 4"):
        run(model, output="one.png")
    Path("p.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="no prompt"):
        run(model)
    assert not Path("out").exists()


def test_text_features_in_memory_are_those_of_one_chunk(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(9)
    asked: list[int] = []
    find = drawing.features_of

    def counted(jobs: Any, *rest: Any) -> Any:
        asked.append(len(jobs))
        return find(jobs, *rest)

    monkeypatch.setattr(walk, "features_of", counted)
    monkeypatch.setattr(walk, "AHEAD", 5)
    run(model)
    assert asked == [5, 5, 2]


def test_the_model_makes_room_for_the_text_encoder(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(6)
    find, load = drawing.features_of, drawing.load_painter
    events: list[str] = []

    def cramped(*given: Any) -> Any:
        events.append("text")
        if events[-2:] == ["model", "text"]:
            raise ResourceError("the text encoder needs about 9 GiB")
        return find(*given)

    def loaded(*given: Any) -> Any:
        events.append("model")
        return load(*given)

    monkeypatch.setattr(walk, "features_of", cramped)
    monkeypatch.setattr(walk, "load_painter", loaded)
    monkeypatch.setattr(walk, "AHEAD", 5)
    run(model, seed=1)
    assert events == ["text", "model", "text", "text", "model"]


@pytest.mark.parametrize("why", [KeyboardInterrupt, BrokenPipeError])
def test_a_job_that_is_stopped_says_that_the_same_command_goes_on(model: str, why: type[BaseException]) -> None:
    lines(4)

    def stop(picture: object) -> None:
        if len(contents()) == 3:
            raise why

    with pytest.raises(Interrupted, match=r"stopped after 3 of 6 pictures \(the same command goes on\)"):
        sample(SampleOptions(model=model, prompts_file="p.jsonl", output="out/"), Silent(), stop)
    assert len(run(model).pictures) == 3


def _begin(model: str, folder: str) -> None:
    os.chdir(folder)
    run(model, batch_size=2, save_scales="strip")


def test_a_job_that_is_killed_at_any_moment_goes_on(model: str, here: Path) -> None:
    lines(40)
    for _ in range(3):
        before = len(contents())
        job = start(_begin, model, str(here))
        while len(list(Path("out").glob("*.png"))) < before + 2 and job.is_alive():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        job.kill()
        job.join()
        assert job.exitcode == -signal.SIGKILL
    run(model, save_scales="strip")
    found = rows()
    assert len({(row["line"], row["number"]) for row in found}) == len(found) == 54
    assert {row[name] for row in found for name in ("file", "scales")} == set(contents())
    assert run(model).kept == 54
    for row in found:
        with Image.open(Path("out") / row["file"]) as image:
            image.load()
            assert json.loads(image.text["bitgen"]) == row["recipe"]  # type: ignore[attr-defined]


def _share(model: str, folder: str) -> None:
    os.chdir(folder)
    run(model, seed=5, batch_size=2, save_scales="strip")


def test_two_processes_share_the_lines(model: str, here: Path) -> None:
    lines(9)
    same = ['{"prompt": "twins"}'] * 4
    Path("p.jsonl").write_text(Path("p.jsonl").read_text() + "\n".join(same) + "\n{\n")
    finish(start_ranks(2, _share, model, str(here)))
    run(model, seed=5, batch_size=2, save_scales="strip", output="alone/")
    assert contents() == contents("alone")
    assert len(contents()) == 2 * 16
    assert len(rows()) == len(rows("alone")) == 16
    listed = {(row["line"], row["number"], row["seed"]) for row in rows()}
    assert listed == {(row["line"], row["number"], row["seed"]) for row in rows("alone")}


def _first_has_nothing_to_draw(model: str, folder: str) -> None:
    os.chdir(folder)
    os.environ["TORCHELASTIC_RUN_ID"] = "job"
    failed = run(model, seed=5, batch_size=1).failures
    assert len(contents()) == 6, "torchrun would end the others now"
    assert len(failed) == (6 if os.environ["RANK"] == "0" else 0)


def test_under_torchrun_a_process_whose_lines_failed_waits_for_the_others(model: str, here: Path) -> None:
    Path("p.jsonl").write_text("{\na dog\n" * 6)
    finish(start_ranks(2, _first_has_nothing_to_draw, model, str(here)))


def test_what_several_processes_cannot_share_is_told(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options in ({"prompts_file": None, "prompts": ("a dog",)}, {"grid": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="2 processes share"):
            run(model, **options)
