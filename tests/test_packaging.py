"""The package where parts are missing: no compiler, no triton, no timm, another torch, another working directory."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "fastib", "kernels", "csrc")

# Compares one forward and backward of the public function with float64 arithmetic; `backend` is what None must choose.
OPERATOR = """
import warnings, torch
from fastib.ops import mhca_attention
from fastib.reference.mhca_attention import mhca_attention_ref
torch.manual_seed(0)
inputs = [torch.randn(2, 3, 13, 8) for _ in range(3)] + [torch.rand(3), torch.randn(3, 2)]
inputs = [x.requires_grad_() for x in inputs]
wide = [x.detach().double().requires_grad_() for x in inputs]
out, exact = (f(*x, (3, 4)) for f, x in ((mhca_attention, inputs), (mhca_attention_ref, wide)))
torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
grad = torch.randn_like(exact)
for x, y in zip(torch.autograd.grad(out, inputs, grad.float()), torch.autograd.grad(exact, wide, grad)):
    torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
"""

# Hides modules as if they were not installed; must run before anything imports them.
HIDE = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)
sys.meta_path[:] = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def run(code, cwd, *paths, hide=(), **env):
    """Runs `code` in a fresh interpreter in `cwd`, with `paths` before everything else; returns what it printed."""
    if hide:
        code = f"HIDDEN = {set(hide)!r}\n{HIDE}\n{code}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "", **env}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_sources(target, skip_native=True):
    """The files that a checkout has, without what was built in it."""
    built = shutil.ignore_patterns("__pycache__", "_native_absent.txt", *(["*.so"] if skip_native else []))
    target.mkdir(exist_ok=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=built)
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def pip_install(source, target, **env):
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    environment = {**os.environ, **env}
    done = subprocess.run(
        [*command, "--target", str(target), str(source)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def without_compiler(tmp_path_factory):
    """(site folder, pip's output, source folder) of an install on a machine with no C++ compiler."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a checkout: there is nothing to install from")
    folder = tmp_path_factory.mktemp("no-compiler")
    source = copy_sources(folder / "source")
    (folder / "bin").mkdir()
    output = pip_install(source, folder / "site", PATH=str(folder / "bin"), CXX="")
    return folder / "site", output, source


def test_import_from_another_directory(tmp_path):
    try:
        importlib.metadata.version("fastib")
        paths = []
    except importlib.metadata.PackageNotFoundError:
        paths = [ROOT]
    run(OPERATOR, tmp_path, *paths)


def test_importing_is_light_and_names_are_lazy(tmp_path):
    run(
        """
        import importlib.util, sys, torch, fastib
        assert "fastib.ops" not in sys.modules
        import fastib.ops, fastib.nn
        assert not torch.cuda.is_initialized()
        assert "triton" not in sys.modules and not any(m.startswith("fastib.kernels.triton") for m in sys.modules)
        assert fastib.apply_mhca is fastib.nn.apply_mhca
        assert {"apply_mhca", "backends", "build_info", "ops", "nn"} <= set(dir(fastib))
        assert not hasattr(fastib, "nonsense")
        spec = importlib.util.find_spec("fastib.kernels.triton.mhca_attention")
        assert spec is not None and spec.origin.endswith("mhca_attention.py"), spec
        """,
        tmp_path,
        ROOT,
    )


def test_import_kernels_is_not_ours(tmp_path):
    ours = "import importlib.util as u; s = u.find_spec('kernels'); print('origin', s and s.origin)"
    assert str(ROOT) not in run(ours, tmp_path)
    # From the root of the checkout, another project's installed `kernels` still wins over the folder of that name.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    run("import kernels; assert kernels.theirs", ROOT, tmp_path)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_without_triton(tmp_path):
    code = """
    import fastib
    reason = fastib.backends()["mhca_attention"]["triton"]
    assert isinstance(reason, str) and reason, reason
    import fastib.nn
    """
    run(textwrap.dedent(code) + OPERATOR, tmp_path, ROOT, hide=["triton"])


def test_operators_and_modules_need_torch_alone(tmp_path):
    others = (
        "triton timm torchvision accelerate safetensors omegaconf rich matplotlib tensorboard sklearn yaml scipy PIL"
    )
    code = """
    import torch, fastib, fastib.nn
    x = torch.randn(2, 17, 24)
    assert fastib.nn.MHCA(24, num_heads=3, grid_size=(4, 4))(x).shape == x.shape
    """
    run(textwrap.dedent(code) + OPERATOR, tmp_path, ROOT, hide=others.split())


def test_models_without_timm_name_what_is_missing(tmp_path):
    code = """
    try:
        import fastib.models
    except ImportError as error:
        assert "timm" in str(error), error
    else:
        raise AssertionError("fastib.models imported without timm")
    """
    run(textwrap.dedent(code), tmp_path, ROOT, hide=["timm"])


def test_no_compiler_install_says_what_is_missing_and_what_it_costs(without_compiler):
    _, output, _ = without_compiler
    assert "no C++ compiler" in output and "slower" in output and "g++" in output


def test_no_compiler_install_has_every_python_file(without_compiler):
    site, _, source = without_compiler
    assert not list(site.rglob("*.so"))
    assert not (site / "kernels").exists()
    names = ("ops/mhca_attention.py", "kernels/triton/mhca_attention.py", "recipes/dearkd/digits.yaml")
    for name in names:
        assert (site / "fastib" / name).is_file(), name
    python_files = {p.relative_to(source) for p in (source / "fastib").rglob("*.py")}
    assert python_files <= {p.relative_to(site) for p in (site / "fastib").rglob("*.py")}


def test_no_compiler_runs_the_reference_and_warns_once(without_compiler, tmp_path):
    site, _, _ = without_compiler
    code = """
    import warnings, fastib, torch
    assert fastib.__file__.startswith(SITE), fastib.__file__
    reason = fastib.backends()["mhca_attention"]["cpu"]
    assert "no C++ compiler" in reason and "reinstall" in reason, reason
    assert "no C++ compiler" in fastib.build_info()["native"]
    x = torch.randn(1, 1, 4, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fastib.ops.mhca_attention(x, x, x, torch.ones(1), torch.zeros(1, 2), (2, 2), num_prefix_tokens=0)
    assert [w.category for w in caught] == [RuntimeWarning], caught
    assert "slower" in str(caught[0].message)
    try:
        fastib.ops.mhca_attention(x, x, x, torch.ones(1), torch.zeros(1, 2), (2, 2), num_prefix_tokens=0, backend="cpu")
    except RuntimeError as error:
        assert "no C++ compiler" in str(error)
    else:
        raise AssertionError
    """
    run(f"SITE = {str(site)!r}\n" + textwrap.dedent(code) + OPERATOR, tmp_path, site)


def test_a_library_that_does_not_load_is_reported(tmp_path):
    copy_sources(tmp_path)
    (tmp_path / "fastib" / "libfastib.so").write_bytes(b"not a library")
    code = """
    import fastib
    reason = fastib.backends()["mhca_attention"]["cpu"]
    assert "does not load" in reason and "rebuild" in reason, reason
    """
    run(textwrap.dedent(code) + OPERATOR, tmp_path / "kernels", tmp_path)


@pytest.mark.slow
def test_the_same_library_runs_under_cpu_only_torch_213(tmp_path):
    if torch.__version__.startswith("2.13.0+cpu"):
        pytest.skip("this is torch 2.13.0+cpu already")
    if not (ROOT / "fastib" / "libfastib.so").exists():
        pytest.skip("the compiled library is absent")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--no-compile"]
    command += ["--target", str(tmp_path / "torch"), "torch==2.13.0+cpu"]
    if subprocess.run(command, capture_output=True, timeout=300).returncode != 0:
        pytest.skip("pip finds no torch 2.13.0+cpu for this Python")
    code = """
    import torch
    assert torch.__version__ == "2.13.0+cpu", torch.__version__
    import fastib
    assert fastib.backends()["mhca_attention"]["cpu"] is True, fastib.backends()
    """
    others = "triton timm torchvision accelerate"
    run(textwrap.dedent(code) + OPERATOR, tmp_path, tmp_path / "torch", ROOT, hide=others.split())
    shutil.rmtree(tmp_path / "torch")


@pytest.mark.parametrize(
    "flags", ["-march=x86-64-v2", "-march=x86-64-v3", "-march=x86-64-v4", "-march=x86-64-v4 -mavx512bf16"]
)
def test_clang_takes_the_kernels(flags):
    """The vector code is written for GCC's and Clang's extensions alike."""
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("clang++ is not installed")
    if platform.machine() != "x86_64":
        pytest.skip("the flags are those of x86-64")
    for source in sorted((ROOT / "kernels" / "cpu").glob("*.cpp")):
        command = [clang, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *flags.split()]
        command += ["-DFASTIB_ISA_NAMESPACE=isa_v3", "-DFASTIB_X86", source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
