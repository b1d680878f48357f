"""Loads the compiled kernels, and says what to do when that fails."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Operators of each type of device, and the libraries that hold them, the first that is there. `fiited_emulated` are the CUDA sources,
# run on the CPU by tests.
NAMESPACES = {"cpu": "fiited", "cuda": "fiited_cuda"}


@cache
def load(namespace: str) -> Any:
    """The operators of a namespace, after loading their library.

    Raises:
        ImportError: when it was never built, or was built for a torch it cannot be loaded with.
    """
    library = find(namespace)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"{library} cannot be loaded by torch {torch.__version__} ({error}); rebuild it with `pip install --no-build-isolation -e .`"
        ) from error
    return getattr(torch.ops, namespace)


def find(namespace: str) -> Path:
    """The library beside this package, or in the installed distribution when this copy of the sources has none (a submitted job's).

    Of the CPU's builds there, the one for the widest vector instructions that torch finds on this machine.

    Raises:
        ImportError: when there is none.
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
    how = "build them with `pip install --no-build-isolation -e .`"
    names: tuple[str, ...]
    if namespace == "fiited":
        builds = {"AVX512": ("_C_avx512.so", "_C_avx2.so"), "AVX2": ("_C_avx2.so",)}.get(torch.backends.cpu.get_cpu_capability(), ())
        names = (*builds, "_C.so")
    elif namespace == "fiited_cuda":
        names, how = ("_cuda.so",), f"for GPUs: {how} where there are nvcc and a torch for CUDA"
    else:
        names, how = ("_emulated.so",), "of the emulated device: build them with `make emulation`"
    for folder in folders:
        for library in (folder / name for name in names):
            if library.exists():
                return library
    raise ImportError(f"the compiled kernels are missing in {' and '.join(map(str, folders))}; {how}")


def _source_folder(direct_url: str) -> str:
    import json
    from urllib.parse import unquote, urlparse

    return unquote(urlparse(json.loads(direct_url)["url"]).path)
