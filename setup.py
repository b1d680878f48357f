"""Builds fiited_ray/_C.so: plain C++ kernels behind libtorch's stable ABI, loaded with torch.ops.load_library.

One binary serves every torch from 2.11 on and every Python: it has no module init and links no libpython. On x86 there are two more
of it, for AVX2 and AVX-512: whole libraries, so that no instruction of one strays into another; which one is loaded is decided there.
The same sums in the same order, without fused multiply-add: results do not depend on it.

Where there is nvcc and a torch for CUDA, _cuda.so beside it is the store on a GPU. FIITED_EMULATION=1 builds _emulated.so and nothing
else: the same CUDA sources for the CPU, which the tests run.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("cuda_ext")
TORCH_ABI = "0x020b000000000000"  # torch 2.11: major, minor and patch in a byte each, from the top


def nvcc_module() -> ModuleType:
    """cuda_ext/nvcc.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("nvcc", KERNELS / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_folder() -> Path:
    """Found, not imported: the build needs torch's headers and one library to link, and nothing of it to run."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("fiited-ray: torch is not installed here; install it first, or build without --no-build-isolation")
    return Path(spec.origin).parent


class BuildKernels(build_ext):
    """A shared library, not a Python module: a plain file name, and a word about a missing compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            raise SystemExit(f"fiited-ray: no C++ compiler ({compiler}): install one that knows C++20 (g++ 12 or clang 15), or set CXX")
        compile_all = self.compiler.compile

        def side_by_side(sources: list[str], **options: Any) -> list[str]:
            longest_first = sorted(sources, key=os.path.getsize, reverse=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [made for each in pool.map(lambda source: compile_all([source], **options), longest_first) for made in each]

        self.compiler.compile = side_by_side
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        ext.include_dirs += [str(torch / "include")]
        ext.library_dirs += [str(torch / "lib")]
        apart = copy.copy(self)  # the libraries are built side by side, of the same sources: each needs objects of its own
        apart.build_temp = str(Path(self.build_temp) / ext.name)
        if ext.name.endswith("_cuda"):
            ext.extra_objects += nvcc_module().compile_all(nvcc, Path(apart.build_temp))
        super(BuildKernels, apart).build_extension(ext)


# The same results in vector code of any width. Square roots set no errno and both sides of a choice may be computed, or loops stay scalar.
ARITHMETIC = ("-ffp-contract=off", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")


def kernels(name: str, *flags: str) -> Extension:
    """One build of all sources."""
    return Extension(
        f"fiited_ray.{name}",
        sources=[str(KERNELS / "binding.cpp"), *sorted(map(str, KERNELS.glob("cpu/*.cpp")))],
        depends=sorted(str(path) for path in KERNELS.rglob("*.*") if path.suffix in (".h", ".cu")),
        include_dirs=[str(KERNELS)],
        libraries=["torch_cpu"],  # already loaded by `import torch`, so no path to it is written into the file
        define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI)],
        extra_compile_args=[
            *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall"),
            *ARITHMETIC,
            *flags,
        ],
        language="c++",
        py_limited_api=True,
    )


# For tests under AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize): one build, and the first fault ends the program.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1")
SANITIZED = bool(os.environ.get("FIITED_RAY_SANITIZE"))


def store_on_device(name: str, sources: list[Path], *flags: str, **more: Any) -> Extension:
    """The store of cuda_ext/cuda, for GPUs or emulated."""
    extension = kernels(name, *flags)
    extension.sources = [
        *map(str, (KERNELS / "cuda" / "binding.cpp", KERNELS / "cpu" / "plan.cpp", KERNELS / "cpu" / "export.cpp", *sources))
    ]
    for key, value in more.items():
        setattr(extension, key, value)
    return extension


def missing_for_cuda() -> str | None:
    """Why there is no store on a GPU here."""
    if nvcc is None:
        return "nvcc is missing"
    return None if (torch_folder() / "lib" / "libtorch_cuda.so").is_file() else "this torch has no CUDA"


ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
nvcc = nvcc_module().find()

extensions = [
    kernels("_C", *(SANITIZE if SANITIZED else ())),
    *([kernels("_C_avx2", "-march=x86-64-v3"), kernels("_C_avx512", "-march=x86-64-v4")] if ON_X86 and not SANITIZED else []),
]
if os.environ.get("FIITED_EMULATION") == "1":
    extensions = [store_on_device("_emulated", [KERNELS / "emulation" / "emulated.cpp"], "-DFIITED_EMULATED")]
elif SANITIZED:
    pass
elif reason := missing_for_cuda():
    print(f"fiited-ray: the store is built for CPUs only, for {reason}")
else:
    toolkit = nvcc_module().runtime(nvcc)
    extensions.append(
        store_on_device(
            "_cuda", [], libraries=["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"], library_dirs=[str(toolkit)]
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"parallel": 3}},
)
