"""Build script: drives CMake once and drops the compiled modules next to the Python package.

Environment switches
  FLCORE_CUDA       auto (default) | 1 | 0    auto: build kernels/*.cu only when nvcc is found
  FLCORE_CUDA_ARCHS default "80;90"           the last one also ships PTX
  FLCORE_DEBUG      1: -O0 -g with assertions
  FLCORE_JOBS       parallel compile jobs (default: what the machine and its memory allow)
  FLCORE_BUILD_DIR  build folder (give sanitizer builds one of their own)
  CMAKE_ARGS        extra arguments passed to the configure step
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
YES, NO = ("1", "on", "yes", "true"), ("0", "off", "no", "false")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(p) for p in candidates if p.exists()), None)


def want_cuda() -> str | None:
    """Path of nvcc when the CUDA module is to be built, else None."""
    choice = os.environ.get("FLCORE_CUDA", "auto").lower()
    if choice not in (*YES, *NO, "auto", ""):
        raise SystemExit(f"flcore: FLCORE_CUDA={choice}: expected auto, 1 or 0.")
    if choice in NO:
        return None
    nvcc = find_nvcc()
    if nvcc is None and choice in YES:
        raise SystemExit(
            "flcore: FLCORE_CUDA=1 but no nvcc was found. Install the CUDA toolkit, put nvcc on "
            "PATH\n        or set CUDA_HOME; or unset FLCORE_CUDA to build the CPU part only."
        )
    return nvcc


def jobs() -> int:
    if n := os.environ.get("FLCORE_JOBS") or os.environ.get("MAX_JOBS"):
        return max(1, int(n))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # one nvcc pass can need about 2 GB
        free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        free_gb = 4.0
    return max(1, min(cpus, int(free_gb / 2)))


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def run(self) -> None:
        if shutil.which("cmake") is None:
            raise SystemExit("flcore: cmake was not found. Run `pip install cmake ninja`.")
        out = Path(self.get_ext_fullpath("flcore._core")).resolve().parent
        out.mkdir(parents=True, exist_ok=True)
        for stale in [p for p in out.glob("_c*") if p.suffix in (".so", ".pyd")]:
            stale.unlink()  # else a CPU-only build would ship the CUDA module of an earlier one
        editable = self.inplace or getattr(self, "editable_mode", False)
        # an editable install keeps its build folder, so the next one only recompiles what changed
        default = ROOT / "build" / "editable" if editable else self.build_temp
        build = Path(os.environ.get("FLCORE_BUILD_DIR", default)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        for step, command in (
            ("configure", ["cmake", "-S", str(ROOT), "-B", str(build), *self.cmake_args(out)]),
            ("compile", ["cmake", "--build", str(build), "--parallel", str(jobs())]),
        ):
            print("flcore:", shlex.join(command), flush=True)
            try:
                subprocess.run(command, check=True)
            except (subprocess.CalledProcessError, OSError) as err:
                code = getattr(err, "returncode", None)
                why = f"exit status {code}" if code is not None else err
                raise SystemExit(
                    f"\nflcore: the native {step} step failed ({why}); its output is above.\n"
                    "        A C++17 compiler (gcc >= 11 or clang >= 12) is needed: "
                    "apt-get install g++ , dnf install gcc-c++ or xcode-select --install.\n"
                    "        A CUDA problem? FLCORE_CUDA=0 builds the CPU part alone."
                ) from None

    def cmake_args(self, out: Path) -> list[str]:
        import pybind11

        kind = "Debug" if os.environ.get("FLCORE_DEBUG") == "1" else "Release"
        args = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={kind}",
            f"-DFLCORE_OUTPUT_DIR={out}",
        ]
        if ninja := shutil.which("ninja"):
            # every time: a cached path may lie in an isolated build environment that is gone
            args += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if shutil.which("ccache"):
            args += [f"-DCMAKE_{lang}_COMPILER_LAUNCHER=ccache" for lang in ("CXX", "CUDA")]
        if nvcc := want_cuda():
            archs = os.environ.get("FLCORE_CUDA_ARCHS", "80;90").split(";")
            # native code for every architecture, PTX for the last: "80-real;90"
            arch_arg = ";".join([f"{a}-real" for a in archs[:-1]] + [archs[-1]])
            args += [
                "-DFLCORE_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={arch_arg}",
            ]
        else:
            args.append("-DFLCORE_CUDA=OFF")  # said aloud, or a cached ON of an earlier build stays
        return args + shlex.split(os.environ.get("CMAKE_ARGS", ""))

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(p) for p in Path(self.build_lib, "flcore").glob("*.so")]


setup(
    packages=[*find_packages("python"), "flcore.pykernels"],
    ext_modules=[CMakeExtension("flcore._core")],
    cmdclass={"build_ext": CMakeBuild},
)
