"""Writes the completions for bash, zsh and fish: `python -m completions.generate`.

They are made from the commands and presets, and are plain files, so that a shell answers at once without
starting Python. A test tells when they are stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitgen_cli.presets import preset_names
from bitgen_cli.runs.published import CATALOGUE
from bitgen_cli.surface import Command, commands, first_line

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """What can stand in a place of the command line.

    Attributes:
        words: fixed words.
        paths: `files`, `folders` or none of them.
    """

    words: tuple[str, ...] = ()
    paths: str = ""


def kinds() -> dict[str, Kind]:
    """What each metavar in bitgen_cli/commands/ stands for."""
    presets = tuple(preset_names())
    free = ("N", "P", "SEED", "NUMBERS", "TEXT", "W:H", "KEY=VALUE", "PROMPT", "WORD", "TOKEN", "NAME", "WEIGHT")
    free += ("SHAPES", "FIELD", "I/N", "K")
    anything = {name: Kind() for name in free}
    return anything | {
        "PRESET": Kind(presets),
        "TARGET": Kind(presets, "files"),
        "FILE": Kind(paths="files"),
        "PATH": Kind(paths="files"),
        "PICTURE": Kind(paths="files"),
        "MASK": Kind(paths="files"),
        "MODEL": Kind(("demo", *CATALOGUE), "files"),
        "DATA": Kind(paths="files"),
        "STORE": Kind(paths="files"),
        "OUT": Kind(paths="folders"),
        "FOLDER": Kind(paths="folders"),
        "PHOTOS": Kind(paths="folders"),
        "SUBJECT": Kind(paths="files"),
        "PARTS": Kind(("token", "text", "cross", "ffn", "self", "lora", "all")),
        "KIND": Kind(("images", "distill", "none")),
        "RUN": Kind(paths="folders"),
        "HOW": Kind(("print", "run")),
        "MODE": Kind(("auto", "none", "cpu")),
        "LOG": Kind(("tensorboard", "wandb")),
        "STAGE": Kind(("tokenizer", "transformer")),
        "DEVICE": Kind(("auto", "cpu", "cuda", "mps")),
        "DTYPE": Kind(("auto", "fp32", "bf16", "fp16")),
        "TYPE": Kind(("auto", "fp32", "bf16", "int8")),
        "FORMAT": Kind(("strip", "webp")),
        "LEVEL": Kind(("0", "1", "2", "3")),
        "STRATEGY": Kind(("ddp", "fsdp")),
        "RESOLUTION": Kind(("0.06M", "0.25M", "0.60M", "1M")),
    }


@dataclass(frozen=True)
class Choice:
    """An option as a shell offers it.

    Attributes:
        names: as typed, such as -n and --num-images.
        help: one line without a full stop.
        value: metavar of its value; empty for a flag.
        repeated: it may be given again.
    """

    names: tuple[str, ...]
    help: str
    value: str
    repeated: bool


def choices(command: Command) -> list[Choice]:
    """What the options of a command offer; the names that say the opposite apart."""
    found: list[Choice] = []
    for option in command.options:
        line = first_line(option.help)
        found.append(Choice(option.names, line, option.value, option.repeated))
        if option.off:
            found.append(Choice(option.off, f"Not: {line}", "", False))
    return found


BASH = r"""# bash completion for bitgen. Written by completions/generate.py; do not edit.

_bitgen() {
    local IFS=$' \t\n' command= word words= paths= options=
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    # --option=value comes as three words
    if [[ $current == '=' ]]; then
        current=
    elif [[ $before == '=' ]]; then
        before=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $word != -* ]]; then
            command=$word
            break
        fi
    done
    case "$command $before" in
        @VALUES@
        *)
            case $command in
                @COMMANDS@
            esac
            # options where one is begun, or where nothing else can stand
            if [[ $current == -* || -z "$words$paths" ]]; then
                words=$options paths=
            fi
            ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    IFS=$'\n'
    case $paths in
        files) COMPREPLY+=($(compgen -f -- "$current")) ;;
        folders) COMPREPLY+=($(compgen -d -- "$current")) ;;
    esac
}

complete -o filenames -F _bitgen bitgen
"""


def bash() -> str:
    """The completions for bash."""
    known, found = kinds(), commands()
    values = [
        f"{'|'.join(_quoted(f'{command.name} {name}') for name in option.names)}) "
        f"{_bash_kind(known[option.value])} ;;"
        for command in found
        for option in choices(command)
        if option.value
    ]
    places = [f"'') words='{' '.join(command.name for command in found)}' options='--version --help -h' ;;"]
    for command in found:
        names = " ".join(name for option in choices(command) for name in option.names)
        kind = _merged([known[argument.value] for argument in command.arguments])
        places.append(f"{command.name}) {_bash_kind(kind)} options='{names}' ;;")
    return _filled(BASH, VALUES=values, COMMANDS=places)


def _filled(template: str, **blocks: list[str]) -> str:
    """The template with each line `@NAME@` replaced by the lines of that name, as far indented."""
    lines: list[str] = []
    for line in template.splitlines():
        text = line.strip()
        if text.startswith("@") and text.endswith("@") and len(text) > 2:
            lines += [line.replace(text, new) for new in blocks[text[1:-1]]]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _bash_kind(kind: Kind) -> str:
    return f"words='{' '.join(kind.words)}' paths={kind.paths}"


def _merged(found: list[Kind]) -> Kind:
    """What any of several places takes."""
    words = dict.fromkeys(word for kind in found for word in kind.words)
    return Kind(tuple(words), next((kind.paths for kind in found if kind.paths), ""))


ZSH_PATHS = {"files": "_files", "folders": "_files -/"}

ZSH = r"""#compdef bitgen
# zsh completion for bitgen. Written by completions/generate.py; do not edit.

@HELPERS@

_bitgen() {
  local context state state_descr line ret=1
  local -a commands
  typeset -A opt_args
  _arguments -C '(- *)--version[Show the version]' '(- *)'{--help,-h}'[Show the help]' \
    '1:command:->command' '*::argument:->argument' && ret=0
  case $state in
    command)
      commands=(
        @NAMES@
      )
      _describe command commands && ret=0
      ;;
    argument)
      case $words[1] in
        @COMMANDS@
      esac
      ;;
  esac
  return ret
}

if [[ $funcstack[1] == _bitgen ]]; then
  _bitgen "$@"
else
  compdef _bitgen bitgen
fi
"""


def zsh() -> str:
    """The completions for zsh."""
    known, found = kinds(), commands()
    lines: list[str] = []
    for command in found:
        specs = [_zsh_option(option, known) for option in choices(command)]
        for place, argument in enumerate(command.arguments, start=1):
            position, value = "*" if argument.several else str(place), argument.value
            specs.append(_quoted(f"{position}:{_zsh_text(value)}:{_zsh_action(value, known[value])}"))
        lines.append(f"{command.name})")
        lines.append("  _arguments \\")
        lines += [f"    {spec} \\" for spec in specs]
        lines.append("    && ret=0")
        lines.append("  ;;")
    names = [_quoted(f"{command.name}:{command.summary}") for command in found]
    helpers = [
        f"{_zsh_helper(name)}() {{ _alternative 'word:word:({' '.join(kind.words)})' "
        f"'path:path:{ZSH_PATHS[kind.paths]}' }}"
        for name, kind in known.items()
        if kind.words and kind.paths
    ]
    return _filled(ZSH, HELPERS=helpers, NAMES=names, COMMANDS=lines)


def _zsh_option(option: Choice, known: dict[str, Kind]) -> str:
    text = f"[{_zsh_text(option.help)}]"
    if option.value:
        text += f":{_zsh_text(option.value)}:{_zsh_action(option.value, known[option.value])}"
    if option.repeated:
        return " ".join(_quoted(f"*{name}{text}") for name in option.names)
    excluded = " ".join(option.names)
    return " ".join(_quoted(f"({excluded}){name}{text}") for name in option.names)


def _zsh_text(text: str) -> str:
    for special in "[]:":
        text = text.replace(special, "\\" + special)
    return text


def _zsh_action(name: str, kind: Kind) -> str:
    if kind.words and kind.paths:
        return _zsh_helper(name)
    return f"({' '.join(kind.words)})" if kind.words else ZSH_PATHS.get(kind.paths, " ")


def _zsh_helper(name: str) -> str:
    """The function that completes a metavar with words and paths."""
    return f"_bitgen_{name.lower()}"


FISH = """# fish completion for bitgen. Written by completions/generate.py; do not edit.

complete -c bitgen -f
complete -c bitgen -n __fish_use_subcommand -l version -d 'Show the version'
complete -c bitgen -n __fish_use_subcommand -s h -l help -d 'Show the help'
@NAMES@
@OPTIONS@
"""


def fish() -> str:
    """The completions for fish."""
    known, found = kinds(), commands()
    first = "complete -c bitgen -n __fish_use_subcommand"
    names = [f"{first} -a {command.name} -d {_quoted(command.summary, for_fish=True)}" for command in found]
    lines: list[str] = []
    for command in found:
        here = f"complete -c bitgen -n '__fish_seen_subcommand_from {command.name}'"
        kind = _merged([known[argument.value] for argument in command.arguments])
        lines.append("")
        if kind != Kind():
            lines.append(here + _fish_kind(kind))
        for option in choices(command):
            typed = "".join(
                f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}" for name in option.names
            )
            value = f" -r{_fish_kind(known[option.value])}" if option.value else ""
            lines.append(f"{here}{typed}{value} -d {_quoted(option.help, for_fish=True)}")
    return _filled(FISH, NAMES=names, OPTIONS=lines)


def _fish_kind(kind: Kind) -> str:
    words = list(kind.words)
    if kind.paths == "folders":
        words.append("(__fish_complete_directories)")
    text = " -F" if kind.paths == "files" else " -f"
    return text + (f" -a {_quoted(' '.join(words), for_fish=True)}" if words else "")


def _quoted(text: str, *, for_fish: bool = False) -> str:
    """The text in single quotes."""
    return "'" + text.replace("'", "\\'" if for_fish else "'\\''") + "'"


def scripts() -> dict[str, str]:
    """The completion files, by name."""
    return {"bitgen.bash": bash(), "_bitgen": zsh(), "bitgen.fish": fish()}


if __name__ == "__main__":
    for name, text in scripts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
