"""Stand-ins for CANN's libraries, so that MindSpore's Ascend plugin loads where CANN is not.

    FOLDER/libcann.so           every function that the plugin links to or looks up, doing nothing, and
                                the classes of classes.cpp
    FOLDER/latest/lib64/*.so    links to it, under every name that the plugin links to or opens
    FOLDER/latest/opp/          empty
    FOLDER/python/hccl/         what MindSpore imports of that package
    FOLDER/manifest.json        what it was built of, and what was found

Nothing of the wheel is run to build them: the symbols are read from its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence, Set

from pangu_locmoe.errors import DryRunError
from pangu_locmoe.files import json_text

CLASSES = Path(__file__).resolve().parent / "classes.cpp"
LIBRARY = "libcann.so"
TOOLS = ("gcc", "g++", "nm", "readelf")
DEFAULT_CHIP = "Ascend910B2"
CHIP_VARIABLE = "LOCMOE_DRY_RUN_CHIP"
"""names the chip that the stand-ins report: it decides which kernels are selected"""

# Of the wheel with which dry runs were tried. Another one may ask classes of CANN for methods that
# classes.cpp does not have: they are functions that return 0 then.
TRIED_SYMBOLS = "d03257fbed8b54ce8bd0123d4915246f8e493f6df8256f3f623e2fbf6ed247c6"

# Opened under names that are not in the plugin as such.
OPENED = (
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libascend_hal.so",
    "libmsprofiler.so",
    "libopapi.so",
)

# Looked up in libopapi.so beside the operators.
OPERATOR_CACHE = (
    "AddTensorAddrToCachedList",
    "CanUsePTACache",
    "InitHugeMemThreadLocal",
    "InitPTACacheThreadLocal",
    "PTAFindExecCache",
    "PTAGetExecCache",
    "ReleaseHugeMem",
    "SetPTACacheHashKey",
    "SetPTAHashKey",
    "UnInitHugeMemThreadLocal",
    "UnInitPTACacheThreadLocal",
)

# They return a handle, of which a null one is an error: theirs is the address of zeros.
_HANDLES = re.compile(r"acl(op|mdl)?Create")
# Type information, which is data.
_TYPES = ("_ZTI", "_ZTS", "_ZTV")
# Python's, and what the loader treats as optional.
_FOREIGN = re.compile(r"_?Py|_ITM_|__gmon")
_SECOND = "GetWorkspaceSize"  # every operator has two functions
# The wheel and CANN have the older std::string: it is part of their symbols' names.
_OLD_STRING = "-D_GLIBCXX_USE_CXX11_ABI=0"
_RUNTIME = (
    "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libgomp.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
)
_CHIP_FUNCTION = f"""#include <stdlib.h>

static char zeros[4096];

const char *aclrtGetSocName(void) {{
  const char *name = getenv("{CHIP_VARIABLE}");
  return name ? name : "{DEFAULT_CHIP}";
}}
"""
_HCCL = {
    "__init__": "",
    "version": '__version__ = "9.0"\n',
    "sys_version": '__sys_version__ = "9.0.0"\n',
}


def ready(cache: Path) -> Path:
    """The folder of the stand-ins for this MindSpore, built if it is not in `cache` yet.

    Raises:
        DryRunError: a tool is missing, the wheel has no Ascend plugin, or the cache cannot be
            written.
    """
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise DryRunError(
                f"--simulate: {tool} is not installed; it builds stand-ins for CANN's libraries "
                "(Debian, Ubuntu: apt-get install g++ binutils)"
            )
    mindspore = _installed()
    plugin = plugin_files(mindspore)
    made_of = _made_of(mindspore, plugin)
    digest = hashlib.sha256(json_text(made_of).encode()).hexdigest()[:16]
    folder = cache / f"cann-{made_of['mindspore']}-{digest}"
    if (folder / "manifest.json").is_file():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as name:
            beside = Path(name) / "libraries"
            beside.mkdir()
            found = _build(mindspore, plugin, beside)
            manifest = json_text({**made_of, **found})
            (beside / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
            # Another process may have been faster: its folder is as good.
            with contextlib.suppress(OSError):
                beside.rename(folder)
    except OSError as error:
        raise DryRunError(f"--simulate: {cache} cannot be written: {error.strerror}") from None
    return folder


def manifest(folder: Path) -> Dict[str, Any]:
    """What stand-ins were built of, and what was found."""
    loaded: Dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return loaded


def plugin_files(mindspore: Path) -> List[Path]:
    """The Ascend plugin's libraries for this machine. Raises DryRunError where there are none."""
    library = mindspore / "lib"
    main = [
        *library.glob("plugin/libmindspore_ascend.so*"),
        *library.glob("plugin/libmindspore_ops_ascend.so"),
    ]
    if not main:
        raise DryRunError(
            f"--simulate: {library / 'plugin'} has no libmindspore_ascend.so; MindSpore's wheels "
            "for Linux have it"
        )
    others = [
        *library.glob("plugin/ascend/*.so"),
        *library.glob("plugin/ascend/ms_kernels_*/**/*.so*"),
        *library.glob("libmindspore_ge_backend.so"),
    ]
    machine = _machine(main[0])
    return sorted(path for path in (*main, *others) if _machine(path) == machine)


def looked_up(plugin: Iterable[Path]) -> Set[str]:
    """Names in the plugin's data that it looks up in CANN's libraries."""
    names = set(OPERATOR_CACHE)
    for path in plugin:
        found = re.findall(rb"(?<=\0)acl[a-z]*[A-Z][A-Za-z0-9]*(?=\0)", path.read_bytes())
        names |= {name.decode() for name in found}
    operators = {name for name in names if name.startswith("aclnn") and not name.endswith(_SECOND)}
    return names | {name + _SECOND for name in operators}


def source(names: Iterable[str]) -> str:
    """The C file that defines functions which do nothing and return 0."""
    lines = [_CHIP_FUNCTION]
    for name in sorted(set(names) - {"aclrtGetSocName"}):
        if name.startswith(_TYPES):
            lines.append(f"char {name}[256];")
        else:
            value = "zeros" if _HANDLES.match(name) else "0"
            lines.append(f"void *{name}(void) {{ return {value}; }}")
    return "\n".join(lines) + "\n"


def _build(mindspore: Path, plugin: Sequence[Path], folder: Path) -> Dict[str, Any]:
    """Fill an empty folder; returns what was found."""
    provided = {*mindspore.glob("*.so*"), *(mindspore / "lib").glob("*.so*"), *plugin}
    _run(
        ["g++", "-std=c++17", "-O1", "-fPIC", _OLD_STRING, "-c", str(CLASSES), "-o", "classes.o"],
        folder,
    )
    classes = _symbols([folder / "classes.o"], "--defined-only", "--extern-only")
    defined = _symbols(sorted(provided), "-D", "--defined-only")
    defined |= _symbols(_runtime(), "-D", "--defined-only")
    undefined = _symbols(plugin, "-D", "--undefined-only") - defined
    linked = {name for name in undefined if not _FOREIGN.match(name)}
    opened = looked_up(plugin)
    (folder / "functions.c").write_text(source((linked | opened) - classes), encoding="utf-8")
    _run(["gcc", "-O1", "-fPIC", "-fno-builtin", "-w", "-c", "functions.c"], folder)
    shared = ["g++", "-shared", "-s", f"-Wl,-soname,{LIBRARY}", "-o", LIBRARY]
    _run([*shared, "functions.o", "classes.o"], folder)
    for name in ("classes.o", "functions.o", "functions.c"):
        (folder / name).unlink()
    libraries = sorted(_unprovided(plugin, provided) | set(OPENED))
    _link(folder, libraries)
    symbols = hashlib.sha256("\n".join(sorted(linked | opened)).encode()).hexdigest()
    return {"symbols_sha256": symbols, "num_symbols": len(linked | opened), "libraries": libraries}


def _link(folder: Path, libraries: Sequence[str]) -> None:
    """What is around the library: its other names, and what MindSpore expects of an installation."""
    library = folder / "latest" / "lib64"
    library.mkdir(parents=True)
    for name in libraries:
        (library / name).symlink_to(Path("..", "..", LIBRARY))
    (folder / "latest" / "opp").mkdir()
    package = folder / "python" / "hccl"
    package.mkdir(parents=True)
    for module, text in _HCCL.items():
        (package / f"{module}.py").write_text(text, encoding="utf-8")


def _made_of(mindspore: Path, plugin: Sequence[Path]) -> Dict[str, Any]:
    """What tells one build from another, read in a moment."""
    version = re.search(r"['\"](.+?)['\"]", (mindspore / "version.py").read_text(encoding="utf-8"))
    sources = b"".join(path.read_bytes() for path in (CLASSES, Path(__file__)))
    return {
        "mindspore": version[1] if version else "unknown",
        "plugin": {str(path.relative_to(mindspore)): path.stat().st_size for path in plugin},
        "sources_sha256": hashlib.sha256(sources).hexdigest(),
    }


def _installed() -> Path:
    spec = importlib.util.find_spec("mindspore")
    assert spec is not None and spec.origin is not None  # a dependency of this package
    return Path(spec.origin).parent


def _unprovided(plugin: Sequence[Path], provided: Iterable[Path]) -> Set[str]:
    """The libraries that the plugin links to and that neither MindSpore nor this machine has."""
    needed: Set[str] = set()
    for path in plugin:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-dW", str(path))))
    unknown = needed - {path.name for path in provided}
    return {name for name in unknown if not _of_toolchain(name).is_absolute()}


def _symbols(paths: Sequence[Path], *options: str) -> Set[str]:
    """Names, without weak references, which may stay undefined."""
    wanted = "U" if "--undefined-only" in options else None
    names = set()
    for line in _output("nm", *options, *map(str, paths)).splitlines():
        fields = line.split()
        if len(fields) > 1 and wanted in (None, fields[-2]):
            names.add(fields[-1].split("@")[0])
    return names


def _runtime() -> List[Path]:
    return [path for path in map(_of_toolchain, _RUNTIME) if path.is_absolute()]


def _of_toolchain(name: str) -> Path:
    """Where the compiler finds a library; the bare name where it does not."""
    return Path(_output("gcc", f"-print-file-name={name}").strip())


def _machine(path: Path) -> bytes:
    """The processor that an ELF file is for."""
    with path.open("rb") as stream:
        return stream.read(20)[18:]


def _output(*command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        raise DryRunError(f"--simulate: {command[0]} failed: {lines[0]}")
