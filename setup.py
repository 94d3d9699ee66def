"""Drives CMake. Everything else about the package is in pyproject.toml."""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
COST = "CPU operators will run their PyTorch reference: same numbers, several times slower."


def find_torch() -> Path | None:
    """Folder of a torch that is new enough, in the environment installed into or the build environment.

    Under build isolation the interpreter hides its own site-packages. Headers and libraries are all that is needed, and
    those of any torch from MIN_TORCH on serve, so the folders are searched on disk and torch is never imported.
    """
    folders = [*sys.path, *(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    if "include-system-site-packages = true" in _venv_config():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path(kind, vars=base) for kind in ("purelib", "platlib")]
    for folder in folders:
        torch = Path(folder) / "torch"
        version = re.search(r"__version__ = '(\d+)\.(\d+)", _read(torch / "version.py"))
        library = torch / "lib" / "libtorch_cpu.so"
        if version and tuple(map(int, version.groups())) >= MIN_TORCH and library.exists():
            return torch
    return None


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _venv_config() -> str:
    return _read(Path(sys.prefix) / "pyvenv.cfg")


def find_compiler() -> str | None:
    """The C++ compiler CMake would take."""
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_tool(name: str) -> str | None:
    """cmake or ninja: in the build environment, beside the interpreter, or on PATH."""
    beside = [str(Path(sys.executable).parent), *(str(Path(p).parent / "bin") for p in sys.path if p)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(beside))


def build_requirements() -> list[str]:
    """What an isolated build must fetch: only what this machine does not have already."""
    if not find_compiler():
        return []
    tools = [name for name in ("cmake", "ninja") if not find_tool(name)]
    return tools + ([] if find_torch() else ["torch>=" + ".".join(map(str, MIN_TORCH))])


class Absent(Exception):
    """The native library cannot be built here, for a reason that does not spoil the rest of the package."""


class CMakeBuild(build_ext):
    """Builds and installs the native part into the package, or leaves a note there that says why not."""

    FILES = ("libfastib_kernels.so", "libfastib.so", "_native_absent.txt")

    def package_folder(self) -> Path:
        root = ROOT if self.inplace else Path(self.build_lib).resolve()
        return root / "fastib"

    def run(self) -> None:
        package = self.package_folder()
        package.mkdir(parents=True, exist_ok=True)
        for old in self.native_files():
            old.unlink(missing_ok=True)
        try:
            self.build_native(package)
        except Absent as reason:
            (package / "_native_absent.txt").write_text(f"{reason}\n")
            print(f"\nfastib: no native library: {reason}\nfastib: {COST}\n", file=sys.stderr, flush=True)

    def build_native(self, package: Path) -> None:
        compiler, torch, cmake, ninja = find_compiler(), find_torch(), find_tool("cmake"), find_tool("ninja")
        if not compiler:
            raise Absent("no C++ compiler when fastib was installed: install g++ 11 or clang 14, then reinstall")
        if not (cmake and (ninja or find_tool("make"))):
            raise Absent("no cmake or no ninja when fastib was installed: pip install cmake ninja, then reinstall")
        if not torch:
            raise Absent("no torch 2.11 or later when fastib was installed: install torch, then reinstall")
        generator = "Ninja" if ninja else "Unix Makefiles"
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / (tag if ninja else f"{tag}-make")
        options = {
            "CMAKE_MAKE_PROGRAM": ninja or find_tool("make"),
            "CMAKE_BUILD_TYPE": "Release",
            "FASTIB_TORCH_DIR": torch,
            "FASTIB_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "FASTIB_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FASTIB_CUDA": os.environ.get("FASTIB_CUDA", "AUTO"),
            "FASTIB_CUDA_ARCHS": os.environ.get("FASTIB_CUDA_ARCHS", "80;90;100;120"),
            "FASTIB_TESTS": "OFF",
        }
        configure = [cmake, "-G", generator, "-S", ROOT, "-B", build, *(f"-D{k}={v}" for k, v in options.items())]
        subprocess.run(list(map(str, configure)), check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(package)], check=True)

    def native_files(self) -> list[Path]:
        module = "_kernels" + sysconfig.get_config_var("EXT_SUFFIX")
        return [self.package_folder() / name for name in (*self.FILES, module)]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.native_files() if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("fastib._kernels", sources=[])] if platform.system() == "Linux" else [],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=build_requirements(),
)
