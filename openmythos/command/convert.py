"""``openmythos convert``: a checkpoint under another family's names."""

from typing import TYPE_CHECKING, Annotated

import typer

from openmythos.command.option import Dtype, Out, Source, parse_dtype

if TYPE_CHECKING:
    from openmythos.interop.mapping import Family


def convert(
    path: Source,
    out: Out,
    to: Annotated[
        str, typer.Option(help="openmythos, or a published family that can express the model.")
    ] = "openmythos",
    dtype: Dtype = None,
) -> None:
    """Write a checkpoint under another family's names, or a published one under ours."""
    wanted = parse_dtype(dtype)
    from openmythos.checkpoint.save import save_pretrained
    from openmythos.interop.hub import local_folder
    from openmythos.interop.loading import load_pretrained, own_tokenizer
    from openmythos.interop.writing import save_as

    family = None if to == "openmythos" else family_named(to)
    model, tokenizer = load_pretrained(path, dtype=wanted), own_tokenizer(local_folder(path))
    if family is None:
        save_pretrained(model, out, tokenizer)
    else:
        save_as(family, model, out, tokenizer=tokenizer)
    print(f"wrote {out}")


def family_named(name: str) -> "Family":
    """The family with this word for ``--to``, which is its name in small letters.

    Raises:
        ValueError: There is none; names the others.
    """
    from openmythos.interop.export import FAMILY
    from openmythos.interop.loading import FAMILIES

    words = {
        family.name.lower().removeprefix("the ").replace(" ", "-"): family
        for family in FAMILIES
        if family is not FAMILY  # a folder with code: that is export's
    }
    if name not in words:
        raise ValueError(f"--to is {name!r}; allowed: openmythos, {', '.join(words)}")
    return words[name]
