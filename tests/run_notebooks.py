"""Run notebooks from clean kernels, in order, and store their outputs: `python tests/run_notebooks.py [NOTEBOOK ...]`.

The outputs are those of the small model on a CPU. Times of execution and other details that change
from run to run are not stored, so that running again changes no more than it must.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"MINIGPT_MODEL": "mini", "MINIGPT_DEVICE": "cpu", "GRADIO_ANALYTICS_ENABLED": "False"}


def run(path: Path) -> float:
    """Execute one notebook in its own folder and write it back whole; return the seconds it took."""
    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return time.perf_counter() - started


def main() -> None:
    os.environ.update(SETTINGS)
    paths = [Path(p).resolve() for p in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for path in paths:
        print(f"{path.name} ...", end=" ", flush=True)
        print(f"{run(path):.0f} s")


if __name__ == "__main__":
    main()
