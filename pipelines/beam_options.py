"""Beam's own options, as they stand after `--` on the command line: read strictly, where Beam drops what it does not know."""

import argparse
import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from featurestore.errors import InputError, MissingExtra

FORWARDING = ("PortableRunner", "FlinkRunner", "SparkRunner", "PrismRunner")
"""Runners with a job server, which has options of its own that Beam's Python does not know."""


def given(args: Sequence[str]) -> dict[str, Any]:
    """Name -> value of the options that differ from Beam's defaults.

    Raises:
        InputError: an option that nobody knows, a value that its option does not take, or a word that belongs to none.
        MissingExtra: the runner's packages are not installed.
    """
    parser = _parser(args)
    found, unknown = parser.parse_known_args(list(args))
    name = runner(args).rpartition(".")[2]
    if unknown and name.lower().removesuffix("runner") not in {each.lower()[:-6] for each in FORWARDING}:
        raise InputError(f"{unknown[0]!r} after -- is no option of Beam{_nearest(unknown[0], parser)}")
    chosen = {name: value for name, value in vars(found).items() if value != parser.get_default(name)}
    if multi := sorted({"direct_num_workers", "direct_running_mode"} & chosen.keys()):
        raise InputError(
            f"--{multi[0]}: Beam's own local multi-processing hangs where a worker is killed; use braid's --workers N instead"
        )
    return chosen


def known(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options in two: those that Beam and the named runner know, and the others."""
    unknown = _parser(args).parse_known_args(list(args))[1]
    kept, rest = [], list(unknown)
    for arg in args:
        if rest and arg == rest[0]:
            rest.pop(0)
        else:
            kept.append(arg)
    return kept, unknown


def check_files(chosen: dict[str, Any]) -> None:
    """InputError where a file that Beam is to bring to the workers is not there: Beam finds out in the middle of submitting."""
    for name in ("setup_file", "requirements_file", "extra_packages"):
        values = chosen.get(name) or []
        for path in [values] if isinstance(values, str) else values:
            if "://" not in path and not Path(path).is_file():
                raise InputError(f"--{name} {path!r}: there is no such file; build it or correct the path")


def runner(args: Sequence[str]) -> str:
    """The runner as it is named, or an empty text; the other options are not looked at."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--runner", nargs="?", default="")
    return parser.parse_known_args(list(args))[0].runner or ""


def _parser(args: Sequence[str]) -> Any:
    """The parser of every option that Beam and the named runner have; a mistake raises InputError."""
    _import_runner(args)
    parsers: list[Any] = []
    # Beam has no other way to its parser that is public.
    PipelineOptions([]).get_all_options(add_extra_args_fn=parsers.append)
    (parser,) = parsers
    parser.error = _refuse
    return parser


def _refuse(message: str) -> None:
    # As Beam itself: its flags take no value, though Google's pages write --no_use_public_ips=true.
    mend = "; a flag stands alone: leave out = and what follows" if "ignored explicit argument" in message else ""
    raise InputError(f"Beam's options after --: {message}{mend}")


def _import_runner(args: Sequence[str]) -> None:
    """A runner that is named in full may bring options, which exist once its module is imported."""
    name = runner(args)
    if module := name.rpartition(".")[0]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtra(f"--runner={name}: {error}; install the packages that it needs") from error


def _nearest(word: str, parser: Any) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; write options as --name=value"
