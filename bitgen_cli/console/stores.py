"""Token stores: what they hold, and whether they are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitgen_cli.console.tables import show_facts, show_tables
from bitgen_cli.console.words import duration
from bitgen_cli.report import Table

if TYPE_CHECKING:
    from bitgen_cli.engine.data_report import CaptionCounts
    from bitgen_cli.runs.tokenize import TokenizeResult
    from bitgen_cli.runs.verify import VerifyResult

WORST, NAMED = 5, 10
"""Pictures named of which most is cut off, and of those that were skipped."""
MUCH = 0.2
"""Share of a picture that is named when it is cut off."""


def show_store(result: TokenizeResult) -> None:
    """Prints what a token store holds to stdout."""
    facts = {
        "store": str(result.out),
        "pictures": f"{result.count}" + (f" ({result.added} new)" if result.added != result.count else ""),
    }
    if result.part is not None:
        facts["part"] = result.part + (", the store is complete" if not result.missing else "")
    if result.bad:
        facts["skipped"] = str(len(result.bad))
    facts["data"] = result.report.layout
    if result.report.captions is not None:
        facts["captions"] = captions_line(result.report.captions)
    if result.report.misclaimed:
        facts["wrong shape"] = f"{_pictures(result.report.misclaimed)} another shape than the data says"
    facts["per picture"] = (
        f"{result.bits_per_image:.0f} bits, {result.bytes_per_image:.0f} bytes in the store"
    )
    if result.text_features:
        facts["text features"] = "of every caption"
    if result.psnr is not None and result.ssim is not None:
        facts["reconstructions"] = f"PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.3f}"
    facts["took"] = duration(result.seconds)
    if result.added:
        facts["took"] += f", {result.images_per_second:.1f} img/s"
    show_facts(facts)
    print()
    show_tables(_store_tables(result))


def captions_line(counts: CaptionCounts) -> str:
    """What there is of captions, in one line."""
    parts = [str(counts.count)]
    if counts.several:
        parts.append(f"{_pictures(counts.several)} several")
    if counts.missing:
        parts.append(f"{_pictures(counts.missing)} none")
    if counts.cut is None and counts.count:
        parts.append(f"unknown how many have more than {counts.limit} tokens: there is no text encoder yet")
    elif counts.cut:
        verb = "is" if counts.cut == 1 else "are"
        parts.append(f"{counts.cut} {verb} cut after {counts.limit} tokens (the longest has {counts.longest})")
    return "; ".join(parts)


def _pictures(count: int) -> str:
    return "1 picture has" if count == 1 else f"{count} pictures have"


def _store_tables(result: TokenizeResult) -> list[Table]:
    """Shapes; which pictures lose most, have their captions cut, or were skipped."""
    told = result.report
    sizes = {entry.ratio: entry for entry in result.ratios}
    rows = [
        [
            bucket.aspect,
            f"{bucket.width} x {bucket.height}",
            str(bucket.count),
            f"{100 * bucket.cropped:.1f} %",
            str(bucket.enlarged or ""),
            str(sizes[bucket.ratio].positions),
            str(sizes[bucket.ratio].bits),
        ]
        for bucket in told.buckets
    ]
    heads = ["shape", "pixels", "pictures", "cut off", "enlarged", "positions", "bits"]
    tables = [Table("shapes", heads, rows)]
    worst = [[entry.key, f"{100 * entry.share:.1f} %"] for entry in told.most_cropped[:WORST] if entry.share >= MUCH]
    if worst:
        tables.append(Table("most is cut off", ["picture", "share"], worst))
    if told.captions is not None and told.captions.cut_of:
        tables.append(Table("captions that are cut", ["picture"], [[key] for key in told.captions.cut_of[:WORST]]))
    if told.bad:
        more = len(told.bad) - NAMED
        bad = [[entry.key, entry.reason] for entry in told.bad[:NAMED]]
        bad += [[f"and {more} more", "in data_report.json"]] if more > 0 else []
        tables.append(Table("skipped", ["picture", "reason"], bad))
    return tables


def show_check(result: VerifyResult) -> None:
    """Prints whether a token store is whole to stdout, else every file that is not."""
    if result.faults:
        for fault in result.faults:
            print(f"{fault.file}: {fault.reason}")
        return
    kept = ["bits", *(["latents"] if result.latents else []), *(["text features"] if result.text_features else [])]
    shards = "1 shard" if result.shards == 1 else f"{result.shards} shards"
    parts = f" of {result.parts} parts" if result.parts > 1 else ""
    facts = {
        "store": str(result.store),
        "verified": f"{result.count} pictures in {shards}{parts}: OK",
        "kept": f"{', '.join(kept)}; {result.bytes} bytes",
        "took": duration(result.seconds),
    }
    show_facts(facts)
