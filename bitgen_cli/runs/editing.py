"""Going on from a picture: the options that follow from it."""

from __future__ import annotations

from dataclasses import replace

from bitgen_cli.errors import UsageError
from bitgen_cli.report import Report
from bitgen_cli.runs.jobs import Remembered, SampleOptions
from bitgen_cli.runs.original import STDIN, Edit, forgetting, read_mask, read_original, require_prompt
from bitgen_cli.runs.recipe_file import Recipe
from bitgen_cli.runs.reproduce import recalled


def load_original(options: SampleOptions, recipe: Recipe | None, report: Report) -> SampleOptions:
    """The options with the picture they go on from, and with its recipe's values for all that was left open but a seed.

    Args:
        options: of the command line, with those of the recipe that it names.
        recipe: that one; the original's gives nothing then.
        report: gets notices about what cannot be as it was.

    Raises:
        InputError: the picture or the mask cannot be read.
        UsageError: options that do not go together, or a model or subject that the user has not by that name.
    """
    if options.original is None:
        if recipe is not None and recipe.original is not None:
            raise UsageError(
                f"the recipe's picture was made of another one, {recipe.original.name[:60]!r}",
                "--from FILE says where it is",
            )
        for flag, value in (("--mask", options.mask), ("--keep-scales", options.keep_scales)):
            if value is not None:
                raise UsageError(f"{flag} says what of a picture stays", "--from PICTURE says of which")
        return options
    if options.original == STDIN == options.prompts_file:
        raise UsageError("--from and --prompts cannot both read stdin", "give one of them as a file")
    original = read_original(options.original, report)
    require_prompt(original, bool(options.prompts or options.prompts_file))
    mask = None if options.mask is None else read_mask(options.mask, original)
    edit = Edit(original, mask, options.keep_scales or 0)
    if recipe is None and original.recipe is not None:
        seed = options.seed
        options = replace(recalled(options, forgetting(original.recipe), report), seed=seed)
    elif recipe is None:
        options = replace(options, remembered=Remembered(None, original.image.height / original.image.width))
    return replace(options, edit=edit)
