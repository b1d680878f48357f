"""Compiles the CUDA sources with nvcc: for setup.py, and for `make cuda-check`, which asks for no GPU and no torch.

python cuda_ext/nvcc.py FOLDER      # objects for sm_80 and sm_90 into FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
ARCHITECTURES = "80 90"  # compute capabilities; others by the variable FIITED_CUDA_ARCHITECTURES
FLAGS = (
    *("-std=c++20", "-O3", "--extended-lambda", "--expt-relaxed-constexpr"),
    "-fmad=false",  # as the CPU's build: sums are then the same to the last bit
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unused-function",
)


def find() -> str | None:
    """nvcc's path: $CUDA_HOME's, the one on the PATH, or the one in the usual place."""
    places = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = [str(place) for place in places if place.is_file()] + [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    return next((place for place in found if place), None)


def runtime(nvcc: str) -> Path:
    """The folder of the CUDA runtime's static library."""
    root = Path(nvcc).resolve().parent.parent
    for folder in (root / "lib64", root / "targets" / "x86_64-linux" / "lib", root / "targets" / "sbsa-linux" / "lib", root / "lib"):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise SystemExit(f"fiited-ray: libcudart_static.a is missing under {root}; install the CUDA toolkit whole")


def compile_all(nvcc: str, folder: Path) -> list[str]:
    """Object files of all sources, in `folder`, as many at a time as there are cores. Ends the program when one does not compile."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = os.environ.get("FIITED_CUDA_ARCHITECTURES", ARCHITECTURES).split()
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in wanted]
    targets.append(f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}")  # for later devices, by their driver

    def compile_one(source: Path) -> str:
        to = folder / f"{source.stem}.o"
        command = [nvcc, *FLAGS, *targets, f"-I{SOURCES}", "-c", str(source), "-o", str(to)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"fiited-ray: nvcc does not compile {source}")
        return str(to)

    longest_first = sorted((SOURCES / "cuda").glob("*.cu"), key=lambda source: source.stat().st_size, reverse=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, longest_first))


if __name__ == "__main__":
    compiler = find()
    if compiler is None:
        print("cuda-check: no nvcc here, so the CUDA sources were not compiled")
    else:
        objects = compile_all(compiler, Path(sys.argv[1]))
        print(f"cuda-check: {len(objects)} CUDA sources compiled for sm_{', sm_'.join(ARCHITECTURES.split())} by {compiler}")
