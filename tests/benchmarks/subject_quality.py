"""How well a model learns a subject from four photos, and what it forgets meanwhile.

    python -m tests.benchmarks.subject_quality [--split tuning|test] [--subjects dog,cat,robot]
        [--variants default,distill,none,token,lora,all,base] [--model demo|FOLDER] [--pictures FILE.png]
        [-- MORE ARGUMENTS OF finetune-subject]

Every subject is taught as a user would: `bitgen finetune-subject` in a process of its own and with nothing made before,
whose time and memory are measured, and `bitgen sample` draws. Prompts with the token are drawn through the subject
file. Prompts without it are drawn by the merged model: `sample` leaves the base model alone when no token stands in the
prompt, so what the new weights do to the class shows only there. `base` is the model that learned nothing; its rows say
what the measures read when there is nothing to find.

    fidelity     share of "a [V] dog PLACE" in places no photo shows that the subject's recogniser says yes to
    leak         share of "a dog PLACE" that it says yes to
    place        share of the first whose place the judge names
    class        share of the first whose class is named, less that of the base model without the token
    class prior  share of "a dog PLACE" and "a dog" whose class is named, less that of the base model
    diversity    entropy of the colours named in 64 pictures of "a dog", as a share of the base model's
    unrelated    share of other classes' held-out triples with class, colour and place right, less the base model's

Places, colours and triples are named by the demo model's judge (judge.py). It never saw looks and takes such dogs and
cats for other classes, so classes are named by a namer that did, in subjects.py like the recognisers. The first tables
show how far all of them can be trusted.

Exit status: 0 when the default variant reaches every bar, 1 when one is missed or a recogniser cannot be trusted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bitgen_cli.demo import world
from bitgen_cli.engine.data import load_picture, to_pil, to_tensor
from bitgen_cli.engine.model_folder import Model, find_model, load_model
from bitgen_cli.errors import BitgenError, InputError
from bitgen_cli.files import HOME, atomic_path
from tests.benchmarks import judge as judging
from tests.benchmarks import subjects
from tests.benchmarks.demo_quality import say, table
from tests.benchmarks.judge import ASPECTS, NAMES, Judge
from tests.benchmarks.subjects import Recogniser, Sitter, TrainedNamer, TrainedRecogniser

TOKEN = "[V]"
DEFAULT, BASE, NO_PRIOR = "default", "base", "none"
VARIANTS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "distill": ("--prior", "distill"),
    NO_PRIOR: ("--prior", "none"),
    "token": ("--train", "token"),
    "lora": ("--train", "token,lora"),
    "all": ("--train", "all"),
    BASE: (),
}
"""What each adds to the command line of finetune-subject; `base` teaches nothing."""

AT_LEAST = {
    "fidelity": 0.85,
    "place": 0.90,
    "class": -0.05,
    "class prior": -0.05,
    "diversity": 0.95,
    "unrelated": -0.05,
}
AT_MOST = {"leak": 0.05, "seconds": 360.0}
"""The bars. All hold for the mean of the subjects, but for the seconds, which every one must keep."""

COLOUR_SAMPLES = 64
"""Pictures of "a dog" whose colours are counted."""
CEILING_PICTURES = 100
SEEDS = {"test": 31_000_000, "tuning": 47_000_000}
"""Of the pictures drawn; those of the tuning split never meet those that count."""
BATCH = 16


# -- what is drawn -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A picture to draw and what it must show; None where the prompt leaves it open."""

    prompt: str
    seed: int
    object_class: str
    colour: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Asks:
    """Every picture that one subject is measured by.

    Attributes:
        subject: with the token, in places that no photo shows.
        plain_subject: the same without the token: what the base model makes of those places.
        places: the class in every place, without the token.
        colours: the bare class, without the token.
        more_colours: the same with other seeds; the base model alone draws them, to show the noise.
        unrelated: held-out triples of the other classes.
    """

    subject: list[Ask]
    plain_subject: list[Ask]
    places: list[Ask]
    colours: list[Ask]
    more_colours: list[Ask]
    unrelated: list[Ask]

    @staticmethod
    def of(sitter: Sitter, split: str, per_place: int) -> Asks:
        """Those of a subject: per_place of each place with the token, half as many without it."""
        name, seed = sitter.object_class, SEEDS[split]
        numbered = [(place, i) for place in sitter.other_places for i in range(per_place)]
        subject, plain_subject = (
            [
                Ask(f"a {prefix}{name} {_phrase(place)}", seed + number, name, place=place)
                for number, (place, _) in enumerate(numbered)
            ]
            for prefix in (f"{TOKEN} ", "")
        )
        everywhere = [place for place in world.PLACES for _ in range(max(1, per_place // 2))]
        triples = [scene for scene in world.scenes(held_out=True) if scene.object_class != name]
        return Asks(
            subject,
            plain_subject,
            [
                Ask(f"a {name} {_phrase(place)}", seed + 10_000 + number, name, place=place)
                for number, place in enumerate(everywhere)
            ],
            [Ask(f"a {name}", seed + 20_000 + number, name) for number in range(COLOUR_SAMPLES)],
            [Ask(f"a {name}", seed + 30_000 + number, name) for number in range(COLOUR_SAMPLES)],
            [
                Ask(str(scene), seed + 40_000 + number, scene.object_class, scene.colour, scene.place)
                for number, scene in enumerate(triples)
            ],
        )

    def without_token(self) -> list[Ask]:
        """What a tuned model is asked for besides the subject."""
        return self.places + self.colours + self.unrelated


def _phrase(place: str) -> str:
    return world.PLACE_PHRASES[place][0]


Drawn = dict[tuple[str, int], Tensor]
"""Pictures (3, h, w) uint8 by prompt and seed."""


def pixels(drawn: Drawn, asks: Sequence[Ask]) -> Tensor:
    """The pictures (B, 3, h, w) of these prompts, in their order."""
    return torch.stack([drawn[ask.prompt, ask.seed] for ask in asks])


# -- the commands ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """What a command took: seconds of the clock, seconds of all cores together, and the most memory it held, in MiB."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def bitgen(home: Path, *arguments: str | Path) -> tuple[dict[str, Any], Spent]:
    """Runs a command with `home` as the user's data folder; its JSON answer, and what it took.

    Raises:
        InputError: it failed; the message is the end of what it said.
    """
    command = [sys.executable, "-m", "bitgen_cli", *map(str, arguments), "--json"]
    environment = os.environ | {HOME: str(home), "PYTHONWARNINGS": "ignore"}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as messages:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=messages, env=environment) as child:
            try:
                _, status, usage = os.wait4(child.pid, 0)
            except BaseException:
                child.kill()
                raise
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        messages.seek(0)
        answer, said = out.read().decode(), messages.read().decode(errors="replace")
    if child.returncode:
        raise InputError(f"bitgen {' '.join(map(str, arguments))} ended with {child.returncode}:\n{said[-2000:]}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return json.loads(answer), Spent(seconds, usage.ru_utime + usage.ru_stime, peak)


def draw(home: Path, folder: Path, asks: Sequence[Ask], model: str | Path) -> Drawn:
    """Draws every prompt once, with `bitgen sample`, into `folder`."""
    unique = list(dict.fromkeys((ask.prompt, ask.seed) for ask in asks))
    folder.mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt, "seed": seed}) + "\n" for prompt, seed in unique))
    answer, spent = bitgen(
        home,
        *("sample", "--model", model, "--prompts", prompts, "--output", folder / "{index}.png"),
        *("--batch-size", str(BATCH), "--no-preview"),
    )
    say(f"drew {len(unique)} pictures in {spent.seconds:.0f} s")
    drawn = {}
    for picture in answer["pictures"]:
        image = load_picture(Path(picture["path"]))
        drawn[picture["prompt"], picture["seed"]] = to_tensor(image, (image.height, image.width))
    return drawn


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eyes:
    """Who looks at the pictures: judge, namer of classes, and one subject's recogniser."""

    judge: Judge
    namer: Recogniser
    recogniser: Recogniser

    def yes(self, drawn: Drawn, asks: Sequence[Ask]) -> float:
        """Share of pictures taken for the subject."""
        return _mean(self.recogniser.says_yes(pixels(drawn, asks)))

    def right(self, drawn: Drawn, asks: Sequence[Ask]) -> dict[str, float]:
        """Share of pictures that show the class, the colour, the place asked for, and all three (`all`)."""
        answers = self.judge.answers(pixels(drawn, asks)).tolist()
        marks = []
        for ask, answer in zip(asks, answers, strict=True):
            wanted = (ask.object_class, ask.colour, ask.place)
            named = [names[index] for names, index in zip(NAMES, answer, strict=True)]
            marks.append([want in (None, name) for want, name in zip(wanted, named, strict=True)])
        right = torch.tensor(marks)
        return {name: _mean(right[:, i]) for i, name in enumerate(ASPECTS)} | {"all": _mean(right.all(1))}

    def named(self, drawn: Drawn, asks: Sequence[Ask]) -> float:
        """Share of pictures whose class is named right whatever the look."""
        wanted = torch.tensor([world.CLASSES.index(ask.object_class) for ask in asks])
        return _mean(self.namer.names(pixels(drawn, asks)) == wanted)

    def colours(self, drawn: Drawn, asks: Sequence[Ask]) -> float:
        """Entropy, in bits, of the colours named."""
        return entropy(self.judge.answers(pixels(drawn, asks))[:, 1].tolist())


def _mean(values: Tensor) -> float:
    return float(values.float().mean())


def entropy(answers: Sequence[int]) -> float:
    """Of the answers' shares, in bits."""
    shares = [count / len(answers) for count in Counter(answers).values()]
    return sum(-share * math.log2(share) for share in shares)


@dataclass(frozen=True)
class Absolute:
    """What a model's pictures show, before it is compared with the base model's.

    Attributes:
        yes: share of the subject's prompts that its recogniser says yes to.
        leak: the same of the class without the token.
        place, class_share: of the subject's prompts, whose place and class are right.
        class_prior: share of the class's prompts without the token whose class is right.
        entropy: of the colours of the bare class, in bits.
        unrelated: share of the other classes' triples that are right in everything.
    """

    yes: float
    leak: float
    place: float
    class_share: float
    class_prior: float
    entropy: float
    unrelated: float

    @staticmethod
    def of(eyes: Eyes, asks: Asks, subject: Sequence[Ask], drawn: Drawn) -> Absolute:
        """What these pictures show; `subject` are the prompts meant for the subject."""
        shown = eyes.right(drawn, subject)
        return Absolute(
            yes=eyes.yes(drawn, subject),
            leak=eyes.yes(drawn, asks.places),
            place=shown["place"],
            class_share=eyes.named(drawn, subject),
            class_prior=eyes.named(drawn, asks.places + asks.colours),
            entropy=eyes.colours(drawn, asks.colours),
            unrelated=eyes.right(drawn, asks.unrelated)["all"],
        )

    def against(self, base: Absolute) -> dict[str, float]:
        """The measures, by the names of the bars."""
        return {
            "fidelity": self.yes,
            "leak": self.leak,
            "place": self.place,
            "class": self.class_share - base.class_share,
            "class prior": self.class_prior - base.class_prior,
            "diversity": self.entropy / base.entropy if base.entropy else 1.0,
            "unrelated": self.unrelated - base.unrelated,
        }


@dataclass(frozen=True)
class Result:
    """One subject in one variant."""

    sitter: Sitter
    variant: str
    absolute: Absolute
    measures: dict[str, float]
    spent: Spent | None
    drawn: Drawn

    def value(self, name: str) -> float | None:
        """A measure, or what was spent."""
        return {**self.measures, **(vars(self.spent) if self.spent else {})}.get(name)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {
            "subject": self.sitter.name,
            "class": self.sitter.object_class,
            "variant": self.variant,
            **self.measures,
            "absolute": vars(self.absolute),
            **(vars(self.spent) if self.spent else {}),
        }


@dataclass(frozen=True)
class Bench:
    """What all subjects and variants share.

    Attributes:
        model: name of the base model, as on the command line.
        work: folder for everything that is made.
        more: arguments added to every finetune-subject.
    """

    model: str
    work: Path
    more: tuple[str, ...]

    def learn(self, sitter: Sitter, variant: str, asks: Asks, eyes: Eyes, base: Absolute) -> Result:
        """Teaches a subject in a data folder of its own, so that nothing made before shortens it, and draws."""
        place = self.work / f"{sitter.name}-{variant}"
        home, photos, merged = place / "home", place / "photos", place / "merged"
        sitter.write_photos(photos)
        say(f"{sitter.name}, {variant}: learning")
        _, spent = bitgen(
            home,
            *("finetune-subject", str(photos), "--class", sitter.object_class, "--name", sitter.name),
            *("--token", TOKEN, "--model", self.model, "--out", str(place / "run"), *VARIANTS[variant], *self.more),
        )
        say(f"{sitter.name}, {variant}: {spent.seconds:.0f} s, {spent.peak_mib:.0f} MiB")
        bitgen(home, "finetune-subject", "--subject", sitter.name, "--model", self.model, "--merge", merged)
        drawn = draw(home, place / "subject", asks.subject, self.model)
        drawn |= draw(home, place / "merged-plain", asks.without_token(), merged)
        absolute = Absolute.of(eyes, asks, asks.subject, drawn)
        self._check_merged(place, merged, asks, eyes, absolute)
        return Result(sitter, variant, absolute, absolute.against(base), spent, drawn)

    def _check_merged(self, place: Path, merged: Path, asks: Asks, eyes: Eyes, found: Absolute) -> None:
        """Warns when the merged model lost the subject: then what it draws without the token proves nothing."""
        some = asks.subject[:: max(1, len(asks.subject) // 12)]
        yes = eyes.yes(draw(place / "no-subjects", place / "merged-subject", some, merged), some)
        if yes < found.yes - 0.35:
            say(
                f"warning: the subject is in {yes:.2f} of the merged model's pictures, in {found.yes:.2f} of the file's"
            )


def ceiling(sitter: Sitter, eyes: Eyes, model: Model) -> list[dict[str, Any]]:
    """What judge and recogniser say to true pictures of the subject, and to what the tokenizer leaves of them."""
    raw = subjects.draw_kind(sitter, "subject", CEILING_PICTURES, subjects.SEED + 2)
    asks = [
        Ask("", number, sitter.object_class, place=world.PLACES[number % len(world.PLACES)])
        for number in range(CEILING_PICTURES)
    ]
    rows = []
    for what, shown in (("pictures", raw), ("reconstructions", subjects.reconstruct(model, raw))):
        drawn = {(ask.prompt, ask.seed): image for ask, image in zip(asks, shown, strict=True)}
        right = eyes.right(drawn, asks)
        rows.append(
            {
                "subject": sitter.name,
                "what": what,
                "yes": eyes.yes(drawn, asks),
                "class": eyes.named(drawn, asks),
                "judge's class": right["class"],
                "place": right["place"],
            }
        )
    return rows


def check_bars(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every bar with what the default variant reached, and whether leaving out the prior shows, when both were run."""
    rows: list[dict[str, Any]] = []
    defaults = [result for result in results if result.variant == DEFAULT]
    for bars, least in ((AT_LEAST, True), (AT_MOST, False)):
        for name, bar in bars.items() if defaults else ():
            values = [value for result in defaults if (value := result.value(name)) is not None]
            worst = min(values) if least else max(values)
            reached = worst if name == "seconds" else sum(values) / len(values)
            passed = reached >= bar if least else reached <= bar
            rows.append(
                {"measure": name, "bar": bar, "at": "least" if least else "most", "reached": reached}
                | {"worst": worst, "pass": passed}
            )
    unguarded = [result.measures["diversity"] for result in results if result.variant == NO_PRIOR]
    if unguarded:
        reached, bar = sum(unguarded) / len(unguarded), AT_LEAST["diversity"]
        name = "diversity with --prior none"
        rows.append(
            {"measure": name, "bar": bar, "at": "most", "reached": reached, "worst": max(unguarded)}
            | {"pass": reached < bar}
        )
    return rows


# -- showing -----------------------------------------------------------------------------------------------------------

SIGNED = ("class", "class prior", "unrelated")


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("seconds", "cpu_seconds", "peak_mib"):
        return f"{value:.0f}"
    return f"{value:+.3f}" if name in SIGNED else f"{value:.3f}"


MEASURES = ("fidelity", "leak", "place", "class", "class prior", "diversity", "unrelated")
COLUMNS = (*MEASURES, "seconds", "cpu_seconds", "peak_mib")


def result_rows(results: Sequence[Result]) -> list[list[str]]:
    """A row for each subject and variant, and the means of each variant of several subjects."""
    rows = [["", *MEASURES, "seconds", "CPU s", "peak MiB"]]
    for variant in dict.fromkeys(result.variant for result in results):
        group = [result for result in results if result.variant == variant]
        rows += [
            [f"{variant}, {result.sitter.name} ({result.sitter.object_class})"]
            + [_cell(name, result.value(name)) for name in COLUMNS]
            for result in group
        ]
        if len(group) > 1:
            means = []
            for name in COLUMNS:
                values = [value for result in group if (value := result.value(name)) is not None]
                means.append(_cell(name, sum(values) / len(values) if values else None))
            rows.append([f"{variant}, mean", *means])
    return rows


def print_report(
    recognisers: Mapping[str, TrainedRecogniser],
    namer: TrainedNamer,
    ceilings: Sequence[Mapping[str, Any]],
    bases: Mapping[str, tuple[Absolute, float]],
    results: Sequence[Result],
    bars: Sequence[Mapping[str, Any]],
) -> None:
    """The tables, on stdout."""
    print("Recognisers: share of yes on reconstructions they never saw; only the subject is one.")
    rows = [["", *subjects.KINDS, "trusted"]]
    for name, trained in recognisers.items():
        shares = [f"{trained.yes[kind]:.3f}" for kind in subjects.KINDS]
        rows.append([name, *shares, "yes" if trained.trustworthy else "NO"])
    print(table(rows), end="\n\n")
    named = ", ".join(f"{share:.3f} of {what}" for what, share in namer.right.items())
    print(f"Namer of classes, right on reconstructions it never saw: {named}", end="\n\n")
    print("Ceiling: true pictures of the subjects, and what the tokenizer leaves of them.")
    rows = [["", "yes", "class", "judge's class", "place"]]
    for row in ceilings:
        rows.append([f"{row['subject']}, {row['what']}", *(f"{row[key]:.3f}" for key in rows[0][1:])])
    print(table(rows), end="\n\n")
    print("The base model, without the token; entropies in bits: how far the two lie apart is noise.")
    rows = [["", "yes", "leak", "place", "class", "class prior", "unrelated", "entropy", "other seeds"]]
    for name, (base, other) in bases.items():
        values = (base.yes, base.leak, base.place, base.class_share, base.class_prior, base.unrelated)
        rows.append([name, *(f"{value:.3f}" for value in values), f"{base.entropy:.2f}", f"{other:.2f}"])
    print(table(rows), end="\n\n")
    print(table(result_rows(results)))
    if bars:
        print()
    for bar in bars:
        verdict, limit = "PASS" if bar["pass"] else "FAIL", "at least" if bar["at"] == "least" else "at most"
        name = bar["measure"]
        digits = 0 if name == "seconds" else 3
        print(
            f"{verdict}  {name}: {bar['reached']:.{digits}f}, bar {limit} {bar['bar']:.{min(digits, 2)}f}"
            f" (worst subject {bar['worst']:.{digits}f})"
        )


TILE, GAP, LINE = 96, 4, 17


def draw_sheet(results: Sequence[Result], asks: Mapping[str, Asks], file: Path) -> None:
    """Writes a sheet: of each subject its photos and samples in other places, and below its class without the token."""
    columns = 4 + 6
    width = columns * (TILE + GAP) + GAP
    height = len(results) * (2 * (TILE + LINE) + LINE + 2 * GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(11)

    def tile(image: Image.Image, column: int, top: int, label: str) -> None:
        left = GAP + column * (TILE + GAP)
        sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        pen.text((left + TILE / 2, top + TILE + LINE / 2 - 1), label, (90, 90, 90), small, "mm")

    top = GAP
    for result in results:
        sitter, some = result.sitter, asks[result.sitter.name]
        name = sitter.object_class
        subject = name if result.variant == BASE else f"{TOKEN} {name}"
        pen.text((GAP, top + LINE / 2), f"photos of a {name}", "black", font, "lm")
        pen.text((GAP + 4 * (TILE + GAP), top + LINE / 2), f'"a {subject} ..."', "black", font, "lm")
        top += LINE
        for column, (photo, place) in enumerate(zip(sitter.photos(), sitter.photo_places, strict=True)):
            tile(photo, column, top, place)
        for column, place in enumerate(sitter.other_places[:6]):
            ask = next(ask for ask in some.subject if ask.place == place)
            tile(to_pil(result.drawn[ask.prompt, ask.seed]), 4 + column, top, _phrase(place))
        top += TILE + LINE
        for column, ask in enumerate(some.colours[:columns]):
            tile(to_pil(result.drawn[ask.prompt, ask.seed]), column, top, f"a {name}")
        top += TILE + LINE + 2 * GAP
    with atomic_path(file) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


# -- the command line --------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what stands behind -- goes to finetune-subject."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    more: list[str] = []
    if "--" in given:
        split = given.index("--")
        given, more = given[:split], given[split + 1 :]

    def names(known: Sequence[str]) -> Any:
        def several(text: str) -> list[str]:
            chosen = [name.strip() for name in text.split(",") if name.strip()]
            unknown = [name for name in chosen if name not in known]
            if unknown or not chosen:
                raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
            return list(dict.fromkeys(chosen))

        return several

    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.subject_quality",
        description=__doc__.split("\n")[0],
        epilog="What stands behind -- is added to the command line of every finetune-subject.",
    )
    parser.add_argument("--split", choices=tuple(SEEDS), default="test", help="settings are chosen on tuning (test)")
    classes = world.LOOK_CLASSES
    parser.add_argument("--subjects", type=names(classes), default=list(classes), help=f"of {', '.join(classes)} (all)")
    parser.add_argument(
        "--variants", type=names(tuple(VARIANTS)), default=[DEFAULT], help=f"of {', '.join(VARIANTS)} (default)"
    )
    parser.add_argument("--model", default="demo", help="demo (the built-in model) or a model folder")
    parser.add_argument("--per-place", type=int, default=16, help="samples of the subject in each place (16)")
    parser.add_argument("--json", action="store_true", help="print numbers instead of tables")
    parser.add_argument("--pictures", type=Path, metavar="FILE.png", help="also write a sheet of the first variant")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep photos, runs, subjects and samples there")
    args = parser.parse_args(given)
    args.more = tuple(more)
    if args.per_place < 1:
        parser.error("--per-place starts at 1")
    if args.keep is not None and args.keep.exists() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep} is not empty")
    return args


def run(args: argparse.Namespace) -> int:
    """Teaches, judges, prints, and gives the exit status."""
    model = load_model(find_model(args.model), parts=("tokenizer",))
    trained = judging.load_or_train()
    sitters = subjects.find_sitters(args.split, args.subjects)
    recognisers = {sitter.name: subjects.load_or_train(sitter, model, say) for sitter in sitters}
    namer = subjects.load_or_train_namer(model, say)
    eyes = {name: Eyes(trained.judge, namer.namer, recogniser.recogniser) for name, recogniser in recognisers.items()}
    asks = {sitter.name: Asks.of(sitter, args.split, args.per_place) for sitter in sitters}
    ceilings = [row for sitter in sitters for row in ceiling(sitter, eyes[sitter.name], model)]

    results: list[Result] = []
    bases: dict[str, tuple[Absolute, float]] = {}
    with ExitStack() as stack:
        work = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitgen-subjects-")))
        bench = Bench(args.model, work.resolve(), args.more)
        everything: list[Ask] = []
        for some in asks.values():
            everything += some.plain_subject + some.without_token() + some.more_colours
        plain = draw(bench.work / "base" / "home", bench.work / "base" / "pictures", everything, args.model)
        for sitter in sitters:
            some, look = asks[sitter.name], eyes[sitter.name]
            base = Absolute.of(look, some, some.plain_subject, plain)
            bases[sitter.name] = base, look.colours(plain, some.more_colours)
        for variant in args.variants:
            for sitter in sitters:
                some, look = asks[sitter.name], eyes[sitter.name]
                base, _ = bases[sitter.name]
                if variant == BASE:
                    pairs = zip(some.subject, some.plain_subject, strict=True)
                    same = {(named.prompt, named.seed): plain[bare.prompt, bare.seed] for named, bare in pairs}
                    results.append(Result(sitter, variant, base, base.against(base), None, plain | same))
                else:
                    results.append(bench.learn(sitter, variant, some, look, base))
    if args.pictures is not None:
        draw_sheet([result for result in results if result.variant == args.variants[0]], asks, args.pictures)
        say(f"pictures: {args.pictures}")
    bars = check_bars(results)
    if args.json:
        print(
            json.dumps(
                {
                    "model": str(model.folder),
                    "fingerprints": model.fingerprints,
                    "split": args.split,
                    "arguments": list(args.more),
                    "recognisers": {name: r.yes | {"trusted": r.trustworthy} for name, r in recognisers.items()},
                    "namer": namer.right,
                    "ceiling": ceilings,
                    "base": {name: vars(base) | {"entropy_other_seeds": o} for name, (base, o) in bases.items()},
                    "results": [result.as_json() for result in results],
                    "bars": bars,
                },
                indent=2,
            )
        )
    else:
        print(f"model: {model.folder}\nsubjects: {args.split} split")
        if args.more:
            print(f"added to finetune-subject: {' '.join(args.more)}")
        print()
        print_report(recognisers, namer, ceilings, bases, results, bars)
    trusted = all(recogniser.trustworthy for recogniser in recognisers.values())
    return 0 if trusted and all(bar["pass"] for bar in bars) else 1


def main() -> None:
    """Runs the command line."""
    args = parse()
    try:
        code = run(args)
    except BitgenError as error:
        say(f"error: {error}")
        code = int(error.exit_code)
    sys.exit(code)


if __name__ == "__main__":
    main()
