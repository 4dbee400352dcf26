"""The entry of the Dataflow flex template: one job of a spec, chosen by the template's parameters.

A launch of a flex template makes one job, and a stage reads what the one before it wrote: so a launch names a stage, and a
view, space, index or set where the spec has several. The other arguments are Beam's, from the launcher: what it adds that this
Beam does not know is left out and told, where `braid` refuses it as a person's mistake.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from featurestore.errors import BraidError, InputError, NotFound


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the job and hands it to the launcher (or submits it): messages and exit status as of `braid`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--name")
    parameters, beam_args = parser.parse_known_args(argv)
    try:
        launch(parameters.spec, parameters.stage, parameters.name, beam_args)
    except BraidError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError | NotFound) else 1)


def launch(spec_uri: str, stage: str, name: str | None, beam_args: Sequence[str]) -> None:
    """Runs one stage of the spec at a path or URI, of one view, space, index or set where `name` says so."""
    from rich.console import Console

    from jobs.plan import STAGES
    from jobs.run import Runner
    from jobs.spec import load
    from pipelines import beam_options

    if stage not in STAGES:
        raise InputError(f"--stage={stage!r} is not a stage; one of: {', '.join(STAGES)}")
    spec = load(spec_uri)
    names = {"shard": [spec.corpus.name], "encode": spec.views, "align": spec.spaces, "index": spec.indexes}
    known = list(names.get(stage, spec.training_sets))
    if name is not None and name not in known:
        raise NotFound(f"--name={name!r}: the spec has no such thing to {stage}; it has: {', '.join(known) or 'none'}")
    if not any(arg.partition("=")[0] == "--runner" for arg in beam_args):
        beam_args = ["--runner=DataflowRunner", *beam_args]
    beam_args, unknown = beam_options.known(beam_args)
    if unknown:
        told = ", ".join(unknown)
        logging.getLogger("braid.flex").warning(
            "left out what this Beam does not know of the launcher's options: %s", told
        )
    if not Runner(spec, Console(), beam_args).run([stage], name):
        raise InputError(f"--stage={stage}: everything of it is fresh, there is no job to launch")


if __name__ == "__main__":
    main()
