"""Loads the compiled kernels, and says what to do when that fails."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path

import torch


@cache
def load() -> None:
    """Load the extension into `torch.ops.fiited`.

    Raises:
        ImportError: when it was never built, or was built for a torch it cannot be loaded with.
    """
    library = _find()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"{library} cannot be loaded by torch {torch.__version__} ({error}); rebuild it with `pip install --no-build-isolation -e .`"
        ) from error


def _find() -> Path:
    """The library beside this package, or in the installed distribution when this copy of the sources has none (a submitted job's).

    Of the builds there, the one for the widest vector instructions that torch finds on this machine.
    """
    folders = [Path(__file__).parent.parent]
    try:
        distribution = importlib.metadata.distribution("fiited-ray")
        folders += [Path(str(distribution.locate_file("fiited_ray")))]
        direct = distribution.read_text("direct_url.json")
        if direct:
            folders += [Path(_source_folder(direct)) / "fiited_ray"]
    except importlib.metadata.PackageNotFoundError:
        pass
    builds = {"AVX512": ("_C_avx512.so", "_C_avx2.so"), "AVX2": ("_C_avx2.so",)}.get(torch.backends.cpu.get_cpu_capability(), ())
    for folder in folders:
        for library in (folder / name for name in (*builds, "_C.so")):
            if library.exists():
                return library
    raise ImportError(
        f"the compiled kernels are missing in {' and '.join(map(str, folders))}; build them with `pip install --no-build-isolation -e .`"
    )


def _source_folder(direct_url: str) -> str:
    import json
    from urllib.parse import unquote, urlparse

    return unquote(urlparse(json.loads(direct_url)["url"]).path)
