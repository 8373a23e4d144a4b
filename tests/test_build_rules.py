"""The rules of the native build (CONTRIBUTING.md says why), checked on what was really built."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.subprocess

ROOT = Path(__file__).resolve().parents[1]
BUILD_FILE = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}" / "build.ninja"
FORBIDDEN_FLAGS = re.compile(r"-ffast-math|-Ofast|-funsafe-\S+|-m(?:arch|cpu)=native")
ALLOCATION = re.compile(
    r"\b(?:malloc|calloc|realloc|free|aligned_alloc|posix_memalign|alloca|new|(?<!= )delete)\b"
    r"|std::(?:vector|string|deque|list|map|set|unordered_\w+|function|make_unique|make_shared|\w+_ptr)\b"
)

needs_build = pytest.mark.skipif(
    not BUILD_FILE.exists(), reason="needs the objects of `python setup.py build_ext --inplace`"
)
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="needs nm and readelf")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux only")


@dataclass(frozen=True)
class CompiledObject:
    """One compilation in build.ninja; `capability` is None for the sources compiled once."""

    path: Path
    source: str
    flags: str

    @property
    def capability(self) -> str | None:
        match = re.search(r"-DSCA_CPU_CAPABILITY=(\w+)", self.flags)
        return match.group(1) if match else None


def compiled_objects() -> list[CompiledObject]:
    rows = re.findall(r"^build (\S+\.o): compile (\S+)\n  flags = (.*)$", BUILD_FILE.read_text(), re.MULTILINE)
    return [CompiledObject(ROOT / path, source, flags) for path, source, flags in rows]


def kernel_objects() -> list[CompiledObject]:
    objects = [compiled for compiled in compiled_objects() if compiled.capability]
    assert objects, "build.ninja compiles no kernel"
    return objects


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """What `nm` lists, as (kind, demangled name)."""
    listing = run("nm", "--demangle", *options, str(path)).stdout
    rows = re.findall(r"^[0-9a-f ]*([A-Za-z]) (.+)$", listing, re.MULTILINE)
    return [(kind, name) for kind, name in rows]


def run(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def native_module() -> Path:
    import sca_kernels  # noqa: F401  (the module's folder may be an installed one)

    specification = importlib.util.find_spec("sca_kernels._native")
    if specification is None or specification.origin is None:
        pytest.skip("the native kernels are not built")
    return Path(specification.origin)


@needs_build
@needs_binutils
def test_kernel_objects_share_no_symbol():
    """The linker keeps one copy of a weak symbol, which may be the AVX-512 one, for all objects."""
    for compiled in kernel_objects():
        for kind, name in symbols(compiled.path, "--defined-only"):
            assert kind not in "WVu", f"{compiled.path}: weak symbol {name}"
            namespace = f"sca::{compiled.capability}::"
            assert kind.islower() or name.startswith(namespace), (
                f"{compiled.path}: {name} is global and not in {namespace}"
            )


@needs_build
@needs_binutils
def test_kernel_objects_do_not_allocate():
    for compiled in kernel_objects():
        for _, name in symbols(compiled.path, "--undefined-only"):
            assert not ALLOCATION.search(name), f"{compiled.path} calls {name}"


def test_kernel_sources_do_not_allocate():
    comments_and_strings = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
    sources = sorted((ROOT / "csrc" / "cpu").iterdir())
    assert sources
    for source in sources:
        found = ALLOCATION.search(comments_and_strings.sub("", source.read_text()))
        assert found is None, f"{source.name} uses {found.group()}"


@needs_build
def test_no_flag_changes_floating_point_or_fits_only_this_machine():
    assert FORBIDDEN_FLAGS.search(BUILD_FILE.read_text()) is None


@needs_build
def test_each_kernel_is_compiled_for_each_capability_and_the_rest_for_none():
    objects = compiled_objects()
    capabilities = {compiled.capability for compiled in objects} - {None}
    assert "baseline" in capabilities
    once = {compiled.source for compiled in objects if compiled.capability is None}
    assert once == {"csrc/bindings.cpp", "csrc/cpu/dispatch.cpp"}
    for compiled in objects:
        if compiled.capability in (None, "baseline"):
            assert "-mavx" not in compiled.flags, f"{compiled.path} would need AVX to run"
    kernels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.cpp")}
    expected = {(kernel, name) for kernel in kernels - once for name in capabilities}
    assert {(c.source, c.capability) for c in objects if c.capability} == expected


@needs_linux
@needs_binutils
def test_native_module_does_not_see_pytorch():
    module = native_module()
    for _, name in symbols(module, "--dynamic", "--undefined-only"):
        assert not re.search(r"\b(?:at|c10|torch|caffe2|aoti_torch)(?:::|_)", name), name
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", str(module)).stdout))
    allowed = r"(?:ld-linux.*|lib(?:c|m|gcc_s|gomp|pthread|stdc\+\+))\.so\.\d+"
    assert {library for library in needed if not re.fullmatch(allowed, library)} == set()
    assert "libgomp.so.1" in needed, "PyTorch's OpenMP runtime has this name, so it is shared"


CALL_A_KERNEL = """
import json, os, re
import numpy, torch
from sca_kernels import LabelMap, LatentLayout, backend, semantic_cross_attention

torch.set_num_threads(2)
label_map = LabelMap.from_labels(torch.arange(128 * 128).reshape(1, 128, 128) % 3, num_labels=3)
latent_layout = LatentLayout.uniform(num_labels=3, latents=4)
query, latents = torch.randn(1, 1, 128 * 128, 16), torch.randn(1, 1, 12, 16)
with backend("cpu"):
    semantic_cross_attention(query, latents, latents, label_map, latent_layout)
"""


def run_after_a_kernel(script: str) -> list[object]:
    native_module()  # skips where there is none
    return json.loads(run(sys.executable, "-c", CALL_A_KERNEL + script).stdout)


@needs_linux
def test_process_has_one_openmp_runtime():
    """Two runtimes fight over the cores, and a fork after use of either can hang."""
    runtimes = run_after_a_kernel(r"""
paths = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
names = re.compile(r"lib(gomp|omp|iomp\d*)[^/]*\.so")
print(json.dumps(sorted(os.path.realpath(path) for path in paths if names.search(path))))
""")
    assert len(runtimes) == 1, runtimes


@needs_linux
def test_loading_does_not_flush_subnormals():
    """An object linked with -ffast-math flushes them in the whole process as it is loaded."""
    smallest = run_after_a_kernel("""
subnormal = 1e-40
print(json.dumps([
    (torch.tensor(subnormal) * 1).item(),
    (torch.full((1 << 20,), subnormal) * 1).min().item(),  # in every thread
    float(numpy.float32(subnormal) * numpy.float32(1)),
    5e-324 * 1.0,
]))
""")
    assert all(value > 0 for value in smallest), smallest


def build_native_into(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` away from the installed module."""
    folders = ("--build-temp", str(folder), "--build-lib", str(folder))
    return run(sys.executable, "setup.py", "build_ext", *folders, check=False, **environment)


def test_build_refuses_forbidden_flags(tmp_path):
    result = build_native_into(tmp_path, CXXFLAGS="-g -ffast-math")
    if "without its native kernels" in result.stderr:
        pytest.skip("no compiler")
    assert result.returncode != 0
    assert "CXXFLAGS has -ffast-math" in result.stderr


def test_build_without_compiler_says_so_and_goes_on(tmp_path):
    missing = {"CXX": "no-such-compiler"}
    result = build_native_into(tmp_path, SCA_REQUIRE_NATIVE="0", **missing)
    assert result.returncode == 0, result.stderr
    assert "built without its native kernels" in result.stderr
    result = build_native_into(tmp_path, SCA_REQUIRE_NATIVE="1", **missing)
    assert result.returncode != 0
    assert "SCA_REQUIRE_NATIVE" in result.stderr


def test_sdist_holds_the_native_sources(tmp_path):
    # Its own egg-info: a left-over list of files in the tree would be read as well.
    metadata = ("egg_info", "--egg-base", str(tmp_path))
    run(sys.executable, "setup.py", "-q", *metadata, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh")
        for path in (ROOT / "csrc").rglob(pattern)
    }
    assert sources
    assert sources <= names, sorted(sources - names)
    assert {"setup.py", "pyproject.toml", "LICENSE", "sca_kernels/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]
