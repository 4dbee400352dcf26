"""`python -m tests.benchmarks [AREA]`: measures every bar of an area, or of all that there are. Exits 0 when bars are missed:
a missed bar is a figure, not a failure of the measurement."""

import importlib
import pkgutil
import sys

import tests.benchmarks as benchmarks


def main() -> None:
    """Runs the areas named on the command line."""
    # An area's bars may stand in several modules: bench_<area>.py, bench_<area>_<part>.py.
    areas: dict[str, list[str]] = {}
    for module in sorted(
        each.name for each in pkgutil.iter_modules(benchmarks.__path__) if each.name.startswith("bench_")
    ):
        areas.setdefault(module.split("_")[1], []).append(module)
    wanted = sys.argv[1:] or list(areas)
    unknown = [area for area in wanted if area not in areas]
    if unknown:
        sys.exit(f"error: no area {unknown[0]!r}; allowed: {', '.join(areas)}")
    for area in wanted:
        modules = [importlib.import_module(f"tests.benchmarks.{module}") for module in areas[area]]
        print(f"wrote {benchmarks.write(area, [bar for module in modules for bar in module.bars()])}")


if __name__ == "__main__":
    main()
