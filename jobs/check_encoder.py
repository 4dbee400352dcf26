"""`braid check-encoder`: tries on a person's own encoder what every encoder promises."""

import os
import sys
from typing import Any

from rich.console import Console

from featurestore import encoders
from featurestore.encoders import contract
from featurestore.errors import BraidError, DecodeError, InputError

__all__ = ["check_encoder"]


def check_encoder(cls: str, arguments: dict[str, Any], values: list[bytes], console: Console) -> bool:
    """Prints each promise and what of it does not hold; whether all do.

    Args:
        cls: `module:Class`, found from the working directory too.
        arguments: what the class is made with.
        values: raw values to try it on; without any, Braid's own examples of its modality.
        console: where to.

    Raises:
        InputError: there is no such class, or Braid has no examples of its modality and none are given.
        BraidError: it raises on a value that it should take.
    """
    sys.path.insert(0, os.getcwd())
    encoder = encoders.find("torch", {"class": cls, "arguments": arguments})
    if not values and encoder.modality not in contract.EXAMPLES:
        raise InputError(f"there are no examples of {encoder.modality}: give files to try it on, with --value FILE")
    raws = values or contract.examples(encoder.modality)
    console.print(f"{cls}: {encoder.modality}, {encoder.dim} components, {len(raws)} values", markup=False)
    try:
        found = contract.check(encoder, raws)
    except DecodeError as error:
        raise BraidError(
            f"{cls} rejects a value that it is tried on: {error}; give it others with --value FILE"
        ) from error
    for promise, broken in found.items():
        console.print(
            f"  {'no ' if broken else 'yes'}  {promise}{': ' if broken else ''}{'; '.join(broken)}", markup=False
        )
    return not any(found.values())
