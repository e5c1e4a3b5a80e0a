"""The committed completions: fresh, and what real shells offer with them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from bitgen_cli.presets import preset_names

FOLDER = Path(__file__).parents[2] / "completions"
FILES = ("bitgen.bash", "_bitgen", "bitgen.fish")

EXPECTED = {
    ("",): ["finetune-subject", "gen-priors", "inspect-config", "resume", "sample", "tokenize", "train"],
    ("re",): ["resume"],
    ("sample", "--to"): ["--top-k", "--top-p"],
    ("sample", "a dog", "--see"): ["--seed"],
    ("sample", "--seed", ""): [],
    ("sample", "--dtype", ""): ["auto", "bf16", "fp16", "fp32"],
    ("sample", "--offload", ""): ["auto", "cpu", "none"],
    ("sample", "--model", "infinity-8"): ["infinity-8b", "infinity-8b-512"],
    ("sample", "--model", "m"): ["my store"],
    ("train", "--preset", ""): preset_names(),
    ("resume", ""): ["my store"],
    ("inspect-config", "de"): ["demo"],
    ("inspect-config", "pi"): ["picture.png"],
}
"""Words after `bitgen`, the last unfinished, to what a folder with `my store` and `picture.png` offers."""


@pytest.fixture
def generator() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("completions_generate", FOLDER / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, specification.name, module)
        specification.loader.exec_module(module)
        yield module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my store").mkdir()
    (tmp_path / "picture.png").touch()
    return tmp_path


def output(command: list[str], folder: Path) -> list[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_committed_files_are_fresh(generator: ModuleType) -> None:
    for name, text in generator.scripts().items():
        stale = f"{name} is stale: run `python -m completions.generate`"
        assert (FOLDER / name).read_text(encoding="utf-8") == text, stale


def test_every_command_and_option_is_offered(generator: ModuleType) -> None:
    texts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    commands = generator.commands()
    assert len(commands) == 7
    for command in commands:
        assert all(command.name in text for text in texts.values())
        for option in generator.choices(command):
            for name in option.names:
                assert f"{name} " in texts["bitgen.bash"] or f"{name}'" in texts["bitgen.bash"]
                assert f"{name}[" in texts["_bitgen"]
                assert f"-{'l' if name.startswith('--') else 's'} {name.lstrip('-')} " in texts["bitgen.fish"]


_ASK_BASH = (
    'source "$0"; COMP_WORDS=(bitgen "$@"); COMP_CWORD=$#; _bitgen; '
    '((${#COMPREPLY[@]} == 0)) || printf "%s\\n" "${COMPREPLY[@]}"'
)
BASH = ["bash", "--norc", "-c", _ASK_BASH, str(FOLDER / "bitgen.bash")]


@pytest.mark.parametrize("words", EXPECTED, ids=" ".join)
def test_bash_offers(words: tuple[str, ...], folder: Path) -> None:
    assert sorted(output([*BASH, *words], folder)) == EXPECTED[words]


@pytest.mark.parametrize(("typed", "offered"), [(["="], 4), (["=", "fp"], 2)])
def test_bash_offers_values_behind_an_equals_sign(typed: list[str], offered: int, folder: Path) -> None:
    assert len(output([*BASH, "sample", "--dtype", *typed], folder)) == offered


@pytest.mark.parametrize("words", EXPECTED, ids=" ".join)
def test_fish_offers(words: tuple[str, ...], folder: Path) -> None:
    line = " ".join(("bitgen", *(word.replace(" ", "\\ ") for word in words)))
    script = f"source '{FOLDER / 'bitgen.fish'}'; complete -C '{line}'"
    found = output(["fish", "--no-config", "-c", script], folder)
    assert sorted(line.split("\t")[0].removesuffix("/") for line in found) == EXPECTED[words]


ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1='READ''Y '; fpath=('$1' \$fpath); autoload -Uz compinit; compinit -D -u; bitgen() { : }"
shift
for line in "$@"; do
    zpty -r shell seen '*READY *'
    zpty -n -w shell "$line"$'\t'
    zpty -n -w shell $'\x15print END"OF"LIST\n'
    zpty -r shell seen '*ENDOFLIST*'
    print -r -- "$seen"
    print FINISHED
done
zpty -d shell
"""
"""Types each line and a tab in an interactive zsh and prints what its terminal shows."""


def test_zsh_offers(folder: Path) -> None:
    cases = {words: offered for words, offered in EXPECTED.items() if len(offered) > 1}
    lines = [" ".join(("bitgen", *words)) for words in cases]
    shown = "\n".join(output(["zsh", "-f", "-c", ZSH, "zsh", str(FOLDER), *lines], folder))
    screens = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown).split("FINISHED")
    for words, screen in zip(cases, screens, strict=False):
        assert "command not found" not in screen
        listed = screen.replace("\\ ", " ")
        assert [name for name in cases[words] if name in listed] == cases[words]
