"""Builds csrc/ with ninja: `sca_kernels._native` for CPUs and, where nvcc is found, `sca_kernels._cuda` for GPUs.

The modules take plain pointers, so no PyTorch is needed to build it. Each kernel source is compiled
once per instruction set, which setuptools cannot express: hence a build.ninja, which also makes a
second build redo only what changed. All metadata is in pyproject.toml.

Read from the environment: CXX (or CC), CXXFLAGS and LDFLAGS; SCA_REQUIRE_NATIVE=1 makes it an error
when the kernels cannot be built; SCA_SANITIZE=address,undefined builds them with these sanitizers. SCA_CUDA=0 leaves
the kernels for GPUs out, SCA_CUDA=1 makes it an error when nvcc is not found; SCA_CUDA_ARCHS="80 90a 100+PTX" says what
they are compiled for.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("csrc")
# These choose among the instruction sets, so they must run on every processor.
COMPILED_ONCE = (SOURCES / "bindings.cpp", SOURCES / "cpu" / "dispatch.cpp")

COMMON_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fopenmp -fno-lto -fvisibility=hidden -Wall -Wextra -Werror=return-type"
# Without exceptions and RTTI the compiler adds no weak symbols of its own to a kernel object; the
# linker would keep one copy of each for all instruction sets. Nobody reads errno or floating-point
# traps, and doing without them changes no result, unlike the forbidden flags.
KERNEL_FLAGS = "-fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math"
LINK_FLAGS = "-shared -fopenmp -Wl,--as-needed -Wl,-z,relro,-z,now"
CUDA_FLAGS = "-std=c++17 -O3 -DNDEBUG -lineinfo -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden"
CUDA_ARCHITECTURES = "80 90a 100+PTX"
CUDA_LINK_FLAGS = "-shared -cudart static -Xlinker -z,relro,-z,now,--exclude-libs,ALL,--strip-debug"
# The kernels for GPUs as functions of the host, which tests run.
EMULATION_FLAGS = "-DSCA_CUDA_EMULATION -Wno-unknown-pragmas"
# A sanitizer's finding ends the process, so that a test run cannot overlook it.
SANITIZER_FLAGS = "-fno-sanitize-recover=all -fno-omit-frame-pointer -UNDEBUG -O1 -g"
# These change results, make the whole process flush subnormals, or fit only this machine.
FORBIDDEN_FLAGS = re.compile(r"-ffast-math|-Ofast|-funsafe-\S+|-m(arch|cpu)=native")


@dataclass(frozen=True)
class Processor:
    """What to build for one kind of processor: all objects share `flags`, since compilers differ in
    their defaults; kernels are compiled for each capability, whose name is their C++ namespace."""

    flags: str
    capabilities: dict[str, str]


AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
PROCESSORS = {  # by the macro that the compiler predefines
    "__x86_64__": Processor("-march=x86-64", {"avx512": AVX512, "avx2": AVX2, "baseline": ""}),
    "__aarch64__": Processor("-march=armv8-a", {"baseline": ""}),
}


@dataclass(frozen=True)
class Toolchain:
    """A compiler's command line and what it compiles for."""

    compiler: tuple[str, ...]
    processor: Processor


def compiler_candidates() -> list[str]:
    """CXX decides; else the C++ compiler that belongs to CC; else GCC under its usual names."""
    of_cc = re.sub(r"\b(g|c)cc?\b", r"\1++", os.environ.get("CC", ""))
    named = os.environ.get("CXX") or of_cc
    return [named] if named else ["g++", "c++"]


def find_toolchain() -> Toolchain | str:
    """The toolchain, or the reason why there is none and the package gets no native kernels.

    The compiler is asked what it is and compiles for: its name and this machine's can mislead.
    """
    if sys.platform != "linux":
        return f"they support Linux, and this is {sys.platform}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h was not found (often in a package named python3-dev)"
    for candidate in compiler_candidates():
        compiler = tuple(shlex.split(candidate))
        question = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
        try:
            answer = subprocess.run(question, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        macros = set(re.findall(r"^#define (\w+)", answer, re.MULTILINE))
        if "__clang__" in macros:
            return f"{candidate} is Clang, whose OpenMP runtime would be a second beside PyTorch's"
        for macro, processor in PROCESSORS.items():
            if macro in macros and "__ILP32__" not in macros:
                return Toolchain(compiler, processor)
        return f"{candidate} compiles for neither x86-64 nor aarch64"
    return f"no working C++ compiler was found (tried {', '.join(compiler_candidates())})"


def flags_from_environment(name: str) -> list[str]:
    """The user's flags, refused where a global setting would break the rules of this build."""
    value = os.environ.get(name, "")
    if forbidden := FORBIDDEN_FLAGS.search(value):
        raise CompileError(f"{name} has {forbidden.group()}, which these kernels do not allow")
    return shlex.split(value)


def find_nvcc() -> str | None:
    """NVIDIA's compiler, unless the kernels for GPUs are not wanted."""
    wanted = os.environ.get("SCA_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))
    if found is None and wanted:
        raise CompileError(f"SCA_CUDA={wanted}, but nvcc was found neither on PATH nor in {home}/bin")
    return found


def gpu_architectures() -> list[str]:
    """The options by which nvcc is told of what SCA_CUDA_ARCHS lists."""
    options = []
    for name in os.environ.get("SCA_CUDA_ARCHS", CUDA_ARCHITECTURES).replace(";", " ").split():
        number = name.removesuffix("+PTX")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name != number:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def ninja_command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_path(value: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(value))


class NinjaFile:
    """The build.ninja that compiles sources into a folder and links modules."""

    def __init__(self, toolchain: Toolchain, folder: Path) -> None:
        import pybind11  # here, because an sdist or a build without kernels does not need it

        sanitizers = os.environ.get("SCA_SANITIZE", "")
        sanitizer_flags = [f"-fsanitize={sanitizers}", *SANITIZER_FLAGS.split()] if sanitizers else []
        self.processor = toolchain.processor
        self.folder = folder
        # Ours come last, so that a distribution's -O2 does not replace -O3.
        flags = [*flags_from_environment("CXXFLAGS"), *COMMON_FLAGS.split(), *self.processor.flags.split()]
        link_flags = [*flags_from_environment("LDFLAGS"), *LINK_FLAGS.split()]
        link_flags += sanitizer_flags or ["-Wl,--strip-debug"]
        compile_command = ninja_command(*toolchain.compiler, *flags, *sanitizer_flags, f"-I{SOURCES}")
        headers = (pybind11.get_include(), sysconfig.get_path("include"))
        self.python_flags = [f"-isystem{directory}" for directory in headers]
        self.lines = [
            f"builddir = {ninja_path(folder)}",
            "rule compile",
            f"  command = {compile_command} $flags -MMD -MF $out.d -c $in -o $out",
            "  description = compile $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {ninja_command(*toolchain.compiler)} $in -o $out {ninja_command(*link_flags)}",
            "  description = link $out",
        ]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def add_native(self, module: Path) -> None:
        """The kernels for CPUs."""
        built = [f"-DSCA_HAVE_{capability.upper()}" for capability in self.processor.capabilities]
        objects = [
            self._compile(self.folder / f"{source.stem}.o", source, [*built, *self.python_flags])
            for source in COMPILED_ONCE
        ]
        for source in sorted(set(SOURCES.glob("cpu/*.cpp")) - set(COMPILED_ONCE)):
            for capability, capability_flags in self.processor.capabilities.items():
                extra = f"{KERNEL_FLAGS} {capability_flags} -DSCA_CPU_CAPABILITY={capability}".split()
                objects.append(self._compile(self.folder / capability / f"{source.stem}.o", source, extra))
        self._link("link", module, objects)

    def add_cuda_emulation(self, module: Path) -> None:
        """The kernels for GPUs, compiled for the host."""
        flags = [*EMULATION_FLAGS.split(), *self.python_flags]
        objects = [
            self._compile(self.folder / f"{source.stem}.o", source, ["-x", "c++", *flags])
            for source in sorted(SOURCES.glob("cuda/*.cu"))
        ]
        self._link("link", module, [*objects, self._cuda_bindings(module, flags)])

    def add_cuda(self, module: Path) -> None:
        """The kernels for GPUs. What ptxas says of each is kept beside the object."""
        assert nvcc
        command = ninja_command(nvcc, *CUDA_FLAGS.split(), *gpu_architectures(), f"-I{SOURCES}")
        self.lines += [
            "rule compile_cuda",
            f"  command = {command} -MMD -MF $out.d -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas && false)",
            "  description = compile $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link_cuda",
            f"  command = {ninja_command(nvcc, *CUDA_LINK_FLAGS.split())} $in -o $out",
            "  description = link $out",
        ]
        objects = [
            self._compile(self.folder / f"{source.stem}.o", source, [], rule="compile_cuda")
            for source in sorted(SOURCES.glob("cuda/*.cu"))
        ]
        self._link("link_cuda", module, [*objects, self._cuda_bindings(module, self.python_flags)])

    def _cuda_bindings(self, module: Path, flags: list[str]) -> Path:
        name = module.name.partition(".")[0]
        return self._compile(
            self.folder / "bindings.o", SOURCES / "cuda" / "bindings.cpp", [*flags, f"-DSCA_MODULE={name}"]
        )

    def _compile(self, target: Path, source: Path, flags: list[str], rule: str = "compile") -> Path:
        self.lines += [f"build {ninja_path(target)}: {rule} {ninja_path(source)}"]
        self.lines += [f"  flags = {ninja_command(*flags)}"] if flags else []
        return target

    def _link(self, rule: str, module: Path, objects: list[Path]) -> None:
        self.lines += [f"build {ninja_path(module)}: {rule} {' '.join(map(ninja_path, objects))}"]


class BuildAlwaysAsksForNative(build):
    """setuptools skips build_ext when there is no extension; here it runs, to say why."""

    sub_commands = (("build_py", None), ("build_ext", None))


class BuildNative(build_ext):
    """Lets ninja build the extension; setuptools places it in the wheel or beside the sources."""

    def run(self) -> None:
        self.keeps_objects = bool(self.inplace)  # setuptools clears `inplace` while it builds
        if isinstance(toolchain, str):
            message = f"sca-kernels is built without its native kernels: {toolchain}."
            if os.environ.get("SCA_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise CompileError(f"{message} SCA_REQUIRE_NATIVE is set, so that is an error.")
            print(f"{message} Its reference backend will work.", file=sys.stderr)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # An editable install has a new temporary folder each time; the objects must outlive it.
        parent = Path("build") if self.keeps_objects else Path(self.build_temp)
        folder = parent / f"native-{sysconfig.get_config_var('SOABI')}"
        destination = Path(self.get_ext_fullpath(ext.name))
        if ext is native:
            module = self.make(folder, destination.name, NinjaFile.add_native)
            if self.keeps_objects or os.environ.get("SCA_SANITIZE"):  # for tests; a wheel does not hold it
                name = destination.name.replace("_native", "_cuda_emulation")
                self.make(folder / "cuda_emulation", name, NinjaFile.add_cuda_emulation)
        else:
            module = self.make(folder / "cuda", destination.name, NinjaFile.add_cuda)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, destination)

    def make(self, folder: Path, name: str, add: Callable[[NinjaFile, Path], None]) -> Path:
        """Has ninja make a module in a folder of its own, whose build.ninja knows nothing else."""
        assert isinstance(toolchain, Toolchain)
        module, file = NinjaFile(toolchain, folder), folder / "build.ninja"
        add(module, folder / name)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(module.text)
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        options = ["-j", str(self.parallel)] if self.parallel else []
        options += [] if self.verbose else ["--quiet"]
        if subprocess.call([*ninja, "-f", str(file), *options]) != 0:
            raise CompileError("the native kernels did not compile; the messages above say why")
        return folder / name


toolchain = find_toolchain()
nvcc = find_nvcc() if isinstance(toolchain, Toolchain) else None
# No sources here: a machine without a compiler makes sdists too, so MANIFEST.in lists csrc/.
native = Extension("sca_kernels._native", sources=[])
modules = [native] if isinstance(toolchain, Toolchain) else []
if nvcc:
    modules.append(Extension("sca_kernels._cuda", sources=[]))
setup(ext_modules=modules, cmdclass={"build": BuildAlwaysAsksForNative, "build_ext": BuildNative})
