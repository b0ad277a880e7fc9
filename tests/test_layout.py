"""The shape of the project: imports that point one way, and a folder named kernels that is in nobody's way."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# each may import what stands before it, and itself
LAYERS = (
    ("kernels", "reference"),
    ("ops",),
    ("testing", "quantization", "cache"),
    ("modules",),
    ("models",),
    ("engine",),
)
TOP = ("integrations", "cli", "__main__", "__init__")


def layer(part):
    return next((i for i, parts in enumerate(LAYERS) if part in parts), len(LAYERS))


def parts_imported(file):
    """The parts of lmops that a file imports: the first name behind `lmops`."""
    package = file.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            package_name, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            folder = ROOT / "lmops" / part
            if package_name == "lmops" and part and (folder.exists() or folder.with_suffix(".py").exists()):
                yield part


def sources():
    return [f for f in (ROOT / "lmops").rglob("*.py") if "kernels" not in f.relative_to(ROOT / "lmops").parts]


@pytest.mark.parametrize("file", sources(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file):
    own = file.relative_to(ROOT / "lmops").parts[0].removesuffix(".py")
    for other in set(parts_imported(file)) - {own}:
        assert own in TOP or layer(other) < layer(own), f"{file.name}: {own} may not import {other}"
        if own == "reference":
            raise AssertionError(f"{file.name}: a reference imports nothing of lmops, found {other}")


def test_the_import_test_sees_imports():
    found = {part for f in sources() for part in parts_imported(f)}
    assert found >= {"ops", "reference", "kernels"}
    assert "ops" in set(parts_imported(ROOT / "lmops/modules/softmax.py"))
    assert "kernels" in set(parts_imported(ROOT / "lmops/ops/softmax.py"))


def test_kernels_import_triton_and_siblings_only():
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} == {"triton"}, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] == "triton", file


def test_kernels_is_a_plain_folder_behind_a_link():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "lmops" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


def test_nobody_imports_the_folder_by_its_bare_name():
    theirs = ROOT / "lmops/integrations/kernels_hub.py"  # means Hugging Face's package
    for file in [*sources(), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        if file == theirs:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert all(name.split(".")[0] != "kernels" for name in names), file


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_hugging_face_kernels_and_transformers_import_from_the_root():
    """The package of Hugging Face that is called kernels, with the project's root first on sys.path."""
    pytest.importorskip("transformers")
    code = (
        "import sys; sys.path.insert(0, '.'); import kernels, transformers, lmops, lmops.kernels;"
        "from transformers.integrations import hub_kernels; print(kernels.__file__); print(lmops.kernels.__path__)"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    theirs, ours = result.stdout.split("\n")[:2]
    assert "site-packages" in theirs
    assert "lmops/kernels" in ours


def test_a_wheel_carries_the_kernels(tmp_path):
    """Built as pip does it, without the link."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("lmops-*.whl")
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    assert "lmops/kernels/softmax.py" in names
    assert not any(name.startswith(("kernels/", "benchmarks/", "tests/")) for name in names)
