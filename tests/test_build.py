"""The build and the import: instruction sets, the stable ABI, the build backend, sanitizers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkernels
from dlkernels import _C, _libraries

ROOT = Path(__file__).parents[1]
IN_SOURCE_TREE = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


# ---- instruction sets ---------------------------------------------------------------------------------


def test_best_instruction_set_is_chosen():
    usable = [isa for isa in _libraries.built_isas() if _C.cpu_features()[isa]]
    assert _libraries.choose_isa(None) == _libraries.choose_isa("") == usable[-1]


def test_features_include_the_ones_below():
    """Each library is compiled with the flags of the one before it and more."""
    runs = [_C.cpu_features()[isa] for isa in _libraries.ISAS]
    assert runs == sorted(runs, reverse=True)
    assert runs[0]


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in _libraries.built_isas() if _C.cpu_features()[isa]])
def test_every_library_computes_and_passes_the_check(isa):
    code = f"import dlkernels; from dlkernels._check import check_all; assert dlkernels.info()['cpu_isa'] == {isa!r}"
    result = run_python(f"{code}; raise SystemExit(check_all())", DLKERNELS_CPU_ISA=isa)
    assert result.returncode == 0, result.stdout + result.stderr


def test_unknown_instruction_set_is_an_import_error():
    result = run_python("import dlkernels", DLKERNELS_CPU_ISA="avx9")
    assert result.returncode != 0
    assert "ImportError: dlkernels: DLKERNELS_CPU_ISA=avx9: no such instruction set is known." in result.stderr
    assert "Usable here: baseline" in result.stderr


def test_instruction_set_that_the_processor_lacks(monkeypatch):
    features = dict.fromkeys(_libraries.ISAS, False) | {"baseline": True}
    monkeypatch.setattr(_libraries._C, "cpu_features", lambda: features)
    assert _libraries.choose_isa(None) == "baseline"
    with pytest.raises(ImportError, match=r"=avx2: this processor .* does not run avx2\. Usable here: base"):
        _libraries.choose_isa("avx2")


def test_no_library_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(_libraries, "FOLDER", tmp_path)
    with pytest.raises(ImportError, match=r"no CPU library in .*pip install -e"):
        _libraries.choose_isa(None)


# ---- what was built -------------------------------------------------------------------------------------


def test_info_names_what_is_in_use():
    info = dlkernels.info()
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in info["cpu_isas_built"]
    assert info["cpu_isa"] in info["cpu_isas_of_this_machine"]
    assert info["threads"] == torch.get_num_threads()
    assert info["cuda_kernels"] <= (torch.version.cuda is not None)
    for key in info:
        assert key in str(info)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.parametrize("library", sorted((ROOT / "dlkernels").rglob("*.so")), ids=lambda path: path.name)
def test_libraries_use_only_the_stable_abi(library):
    """Nothing of torch's C++ may be undefined in them: that is what breaks when torch is upgraded."""
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split(maxsplit=1)[1] for line in symbols.splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)
    assert not [name for name in names if name.startswith(("c10::", "at::", "torch::"))]


@IN_SOURCE_TREE
@pytest.mark.parametrize(("found", "torch_asked_for"), [(True, False), (False, True)])
def test_backend_asks_for_torch_only_where_there_is_none(monkeypatch, found, torch_asked_for):
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "tools" / "build_backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    monkeypatch.setattr(backend, "find_spec", lambda name: object() if found else None)
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert any(need.startswith("torch") for need in hook()) is torch_asked_for
    assert callable(backend.build_wheel)
    assert callable(backend.build_editable)


# ---- kernels under the sanitizers -------------------------------------------------------------------------


@IN_SOURCE_TREE
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize(
    ("operator", "kernels"),
    [
        (
            "conv2d",
            [
                f"conv2d/{strategy}.cpp"
                for strategy in (
                    "direct",
                    "pointwise",
                    "depthwise",
                    "winograd",
                    "small_channels",
                    "unfold",
                    "across_images",
                )
            ],
        ),
        ("reset_gate_rnn", ["reset_gate_rnn/sequence.cpp"]),
    ],
)
def test_kernels_under_sanitizers(operator, kernels, sanitizer, tmp_path):
    program = tmp_path / operator
    sources = [
        f"tests/sanitizer/{operator}.cpp",
        "tests/sanitizer/parallel.cpp",
        "csrc/cpu/blocks.cpp",
        *(f"csrc/cpu/{kernel}" for kernel in kernels),
    ]
    flags = ["-std=c++20", "-O1", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, *sources, "-o", program], cwd=ROOT, check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
