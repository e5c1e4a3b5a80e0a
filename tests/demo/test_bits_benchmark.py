"""The benchmark of bits: what it measures, and that its bars can be missed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import bits
from tests.benchmarks.bits import Row

ROW = Row("bits16", 16, 20.0, 0.8, 85, 1360, 0.01, 100, 100, (19.0, 21.0))


def test_a_run_is_trained_once_and_measured_with_each_number_of_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("training.tokenizer.batch_size=2", "training.tokenizer.validation_images=0")
    elastic = ("model.tokenizer.bits=8", "model.tokenizer.active_bits=[4,8]")
    monkeypatch.setattr(bits, "TRAINING", "world:4")
    monkeypatch.setattr(
        bits, "TRAININGS", {"elastic": (*elastic, *small, "training.tokenizer.every_bit_count=true")}
    )
    run = bits.trained("elastic", tmp_path, 1)
    before = (run / "metrics.jsonl").read_text()
    assert bits.trained("elastic", tmp_path, 1) == run
    assert (run / "metrics.jsonl").read_text() == before, "what is finished is not trained again"
    found = list(bits.rows(run, bits.held_out(3, 64)))
    assert [(row.bits, row.positions, row.bits_per_picture) for row in found] == [(4, 85, 340), (8, 85, 680)]
    assert all((row.seen, row.decoded, len(row.each)) == (2, 4, 3) for row in found)
    assert all(row.psnr == pytest.approx(sum(row.each) / 3) for row in found)
    assert bits.table(found).splitlines()[2].startswith(f"| elastic | 4 | {found[0].psnr:.2f} dB |")


def test_more_bits_must_show_better() -> None:
    better = replace(ROW, run="bits32", bits=32, psnr=21.0, ssim=0.85)
    assert bits.out_of_order([ROW, better]) == []
    assert bits.out_of_order([ROW, replace(better, psnr=20.0)]) == ["separate: 32 bits show no better than 16"]
    elastic = [replace(ROW, run="elastic"), replace(ROW, run="elastic", bits=64, ssim=0.7, psnr=25.0)]
    assert bits.out_of_order([ROW, *elastic]) == ["elastic: 64 bits show no better than 16"]


@pytest.mark.parametrize(("loss", "verdict"), [(0.1, "no worse"), (0.3, "worse")])
def test_the_elastic_one_is_held_against_the_one_of_its_number(loss: float, verdict: str) -> None:
    elastic = replace(ROW, run="elastic", each=tuple(value - loss for value in ROW.each))
    (line,) = bits.differences([ROW, elastic])
    assert line == (
        f"elastic at 16 bits: -{loss:.2f} dB (standard error 0.00) against bits16: {verdict} (bar 0.2 dB)"
    )
