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
        values: raw values to try it on, of several fields those of each sample in turn; without any, Braid's own examples.
        console: where to.

    Raises:
        InputError: there is no such class, values of a sample are missing, or Braid has no examples and none are given.
        BraidError: it raises on a value that it should take.
    """
    sys.path.insert(0, os.getcwd())
    encoder = encoders.find("torch", {"class": cls, "arguments": arguments})
    if not values and not {*encoder.reads} <= {*contract.EXAMPLES}:
        raise InputError(f"there are no examples of {encoder.modality}: give files to try it on, with --value FILE")
    size = len(encoder.reads)
    if len(values) % size:
        raise InputError(
            f"{len(values)} values: {cls} reads {encoder.modality}, so give {size} for each sample, in order"
        )
    samples = [values[at : at + size] for at in range(0, len(values), size)] or contract.samples(encoder)
    console.print(f"{cls}: {encoder.modality}, {encoder.dim} components, {len(samples)} values", markup=False)
    try:
        found = contract.check(encoder, samples)
    except DecodeError as error:
        raise BraidError(
            f"{cls} rejects a value that it is tried on: {error}; give it others with --value FILE"
        ) from error
    for promise, broken in found.items():
        console.print(
            f"  {'no ' if broken else 'yes'}  {promise}{': ' if broken else ''}{'; '.join(broken)}", markup=False
        )
    return not any(found.values())
