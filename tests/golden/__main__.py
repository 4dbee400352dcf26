"""`python -m tests.golden`: submits every stage to a loopback service and writes the golden files anew."""

import tempfile
from pathlib import Path

from tests.golden import FOLDER, summaries

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, text in summaries(Path(folder)).items():
            (FOLDER / name).write_text(text)
            print(FOLDER / name)
