"""Commands that show what a subcommand is for: the last part of its --help, and of its chapter in the reference."""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    """A command as it can be typed, and what it does."""

    command: str
    does: str


EXAMPLES: dict[str, tuple[Example, ...]] = {
    "": (
        Example('bitgen sample "a red dog on the moon"', "the first picture"),
        Example("bitgen sample --help", "all about one command"),
        Example("bitgen inspect-config demo", "what the built-in model is made of"),
    ),
    "sample": (
        Example('bitgen sample "a red dog on the moon" -n 4 --seed 1 --grid', "four pictures, and all of them as one"),
        Example('bitgen sample "a cat" --cfg 4 --tau 0.7 --output cat.png', "closer to the prompt, and safer"),
        Example('bitgen sample "a dog" --from cat.png --mask 8,8,48,48', "a part drawn anew, the rest kept"),
        Example("bitgen sample --prompts prompts.txt --output out/", "a picture for every line of a file"),
    ),
    "tokenize": (
        Example("bitgen tokenize photos/ stores/photos", "a folder of pictures, with captions beside them or without"),
        Example(
            "bitgen tokenize photos/ stores/seen --reconstruct 16",
            "and shows 16 of them as their bits decode, beside the originals",
        ),
        Example('bitgen tokenize "shards/{00000..00099}.tar" stores/tars', "WebDataset tars"),
        Example("bitgen tokenize --verify stores/photos", "whether a store is whole"),
    ),
    "train": (
        Example("bitgen train --preset demo --data photos/ --out runs/tokens", "a tokenizer, from pictures"),
        Example(
            "bitgen train --preset demo --data stores/my --out runs/my --init runs/tokens",
            "a transformer, from the token store that this tokenizer made",
        ),
        Example(
            "bitgen train --preset 16bit --data photos/ --out runs/new --dry-run",
            "only what it would need of memory and disk",
        ),
    ),
    "finetune-subject": (
        Example("bitgen finetune-subject photos/ --class dog", "from 3 to 5 photos; prompts then call it [V]"),
        Example('bitgen sample "a [V] dog on the moon"', "draw it"),
        Example(
            'bitgen finetune-subject rex/ --class dog --token "[rex]" --train token,lora',
            "a small adapter, which can stand beside others in a prompt",
        ),
        Example("bitgen finetune-subject --subject rex --merge models/rex", "a whole model with the subject in it"),
    ),
    "gen-priors": (
        Example("bitgen gen-priors --class dog --count 100", "what finetune-subject would draw by itself"),
        Example(
            'bitgen gen-priors --class dog --output dogs/ --template "one {class}"',
            "into a folder of your own, by a prompt of your own",
        ),
    ),
    "resume": (
        Example("bitgen resume runs/my", "go on after Ctrl-C, a crash or a power cut"),
        Example("bitgen resume runs/my --steps 500", "train 500 steps more than was planned"),
    ),
    "inspect-config": (
        Example("bitgen inspect-config infinity-2b", "values, scales, parameters, and the memory it needs"),
        Example("bitgen inspect-config demo --set model.transformer.depth=8", "what a change would mean"),
        Example("bitgen inspect-config cat.png", "how a picture was made"),
        Example("bitgen inspect-config runs/my --plot curves.png", "how a training went"),
    ),
}
"""By the name of the subcommand; those of `bitgen` itself by the empty name."""
