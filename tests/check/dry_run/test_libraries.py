"""Stand-ins for CANN's libraries: what they define, and what is said where they cannot be built."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import yaml
from support.small import SMALL

from pangu_locmoe.check.dry_run import libraries
from pangu_locmoe.cli import main
from pangu_locmoe.errors import DryRunError


def test_operators_have_a_second_function(tmp_path):
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"\x7fELF\0aclnnAdd\0aclrtMalloc\0acl\0accurate\0xaclnnNo\0")
    found = libraries.looked_up([plugin]) - set(libraries.OPERATOR_CACHE)
    assert found == {"aclnnAdd", "aclnnAddGetWorkspaceSize", "aclrtMalloc"}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_functions_do_nothing_and_handles_are_not_null(tmp_path):
    text = libraries.source(["aclnnAdd", "aclCreateTensor", "_ZTI1A", "aclrtGetSocName"])
    (tmp_path / "functions.c").write_text(text)
    command = ["gcc", "-shared", "-fPIC", "-w", "functions.c", "-o", "functions.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "functions.so"))
    for name in ("aclnnAdd", "aclCreateTensor", "aclrtGetSocName"):
        getattr(library, name).restype = ctypes.c_void_p
    assert library.aclnnAdd() is None
    assert library.aclCreateTensor() is not None
    assert ctypes.string_at(library.aclrtGetSocName()) == b"Ascend910B2"


def test_another_plugin_is_another_folder(tmp_path, monkeypatch):
    """A folder that is there is not built again; it is named by what it was built of."""
    built = []

    def build(mindspore, plugin, folder):
        built.append(folder)
        return {"symbols_sha256": libraries.TRIED_SYMBOLS}

    plugin = tmp_path / "libmindspore_ascend.so.2"
    plugin.write_bytes(b"one")
    (tmp_path / "version.py").write_text("__version__ = '2.10.0'\n")
    monkeypatch.setattr(libraries.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(libraries, "_installed", lambda: tmp_path)
    monkeypatch.setattr(libraries, "plugin_files", lambda mindspore: [plugin])
    monkeypatch.setattr(libraries, "_build", build)
    cache = tmp_path / "cache"
    first = libraries.ready(cache)
    assert libraries.ready(cache) == first and len(built) == 1
    assert first.name.startswith("cann-2.10.0-")
    assert libraries.manifest(first)["mindspore"] == "2.10.0"
    plugin.write_bytes(b"another")
    assert libraries.ready(cache) != first and len(built) == 2
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        path.name for path in {first, libraries.ready(cache)}
    )


def test_a_wheel_without_the_plugin(tmp_path):
    with pytest.raises(DryRunError, match=r"has no libmindspore_ascend\.so"):
        libraries.plugin_files(tmp_path)


def test_without_a_compiler_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries.shutil, "which", lambda tool: None)
    with pytest.raises(DryRunError, match="gcc is not installed") as raised:
        libraries.ready(tmp_path / "cache")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()


def test_the_verb_without_a_compiler_compiles_nothing(tmp_path, monkeypatch, capsys):
    capacity = {"local_factor": 2.0, "remote_factor": 2.0}
    values = {
        **SMALL,
        "moe": {**SMALL["moe"], "capacity": capacity},
        "parallel": {"expert_parallel": 2, "sizes": "static"},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries.shutil, "which", lambda tool: None)
    assert main(["check", str(path), "--ranks", "2", "--simulate"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "pangu-locmoe: --simulate: gcc is not installed" in printed.err


def test_several_ranks_are_for_a_dry_run(tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    assert main(["check", str(path), "--ranks", "4", "--rank", "0", "3"]) == 2
    assert "--rank 0 3: several only with --simulate" in capsys.readouterr().err
    assert main(["check", str(path), "--ranks", "4", "--rank", "0", "4", "--simulate"]) == 2
    assert "--rank 4: must be between 0 and 3" in capsys.readouterr().err
