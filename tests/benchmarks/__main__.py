"""`python -m tests.benchmarks [AREA]`: measures every bar of an area, or of all that there are. Exits 0 when bars are missed:
a missed bar is a figure, not a failure of the measurement."""

import importlib
import pkgutil
import sys

import tests.benchmarks as benchmarks


def main() -> None:
    """Runs the areas named on the command line."""
    areas = sorted(
        module.name.removeprefix("bench_")
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if module.name != "__main__"
    )
    wanted = sys.argv[1:] or areas
    unknown = [area for area in wanted if area not in areas]
    if unknown:
        sys.exit(f"error: no area {unknown[0]!r}; allowed: {', '.join(areas)}")
    for area in wanted:
        print(f"wrote {benchmarks.write(area, importlib.import_module(f'tests.benchmarks.bench_{area}').bars())}")


if __name__ == "__main__":
    main()
