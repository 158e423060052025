"""The shape of the package: who may import whom, what is public, and what stands in its files."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kairos

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kairos"

# Imports point down or sideways, never up.
LAYERS = {
    "endpoint": 1,
    "errors": 0,
    "ops": 1,
    "process": 0,
    "conditioning": 2,
    "data": 2,
    "distributed": 2,
    "models": 2,
    "request": 2,
    "schedulers": 2,
    "sizes": 2,
    "weights": 2,
    "worlds": 2,
    "curation": 3,
    "evaluation": 3,
    "hub": 3,
    "memory": 3,
    "model_info": 3,
    "pipeline": 3,
    "placement": 3,
    "streaming": 3,
    "presets": 3,
    "training": 3,
    "bench": 4,
    "cli": 4,
    "__main__": 5,
}

PUBLIC = {
    "FewStepScheduler",
    "FlowMatchScheduler",
    "KairosError",
    "KairosPipeline",
    "KairosPipelineOutput",
    "KairosTransformer3DModel",
    "MachineError",
    "StreamingVAEDecoder",
    "UserError",
    "WorldState",
    "__version__",
}


EXTRAS = ("curation", "quantize", "ray", "train")
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv_python_headless",
    "scenedetect": "scenedetect_headless",
    "yaml": "pyyaml",
}
INSTALLED_WHERE_THERE_IS_A_GPU = {"fla"}
USED_BY_OTHERS = {"accelerate", "onnxruntime", "peft"}


def part_of(module: str) -> str | None:
    """`kairos.ops.rotary` -> `ops`; a public name of the package -> where it lives."""
    name = module.split(".")[1]
    if name in LAYERS:
        return name
    home = kairos._HOME.get(name)
    return home.split(".")[1] if home else None


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, importing part, imported part) for every import within the package, also inside functions."""
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "kairos":
                modules = [f"kairos.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for module in modules:
                part = part_of(module) if module.startswith("kairos.") else None
                if part is not None:
                    yield str(file.relative_to(ROOT)), own, part


def test_every_part_of_the_package_has_its_place() -> None:
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/*.py")
    }
    assert parts - {"__init__"} <= set(LAYERS)


def test_imports_point_down() -> None:
    upward = [f"{file} imports {part}" for file, own, part in imports() if LAYERS[part] > LAYERS[own]]
    assert upward == []


def test_models_and_operations_know_nothing_but_mathematics() -> None:
    allowed = {"ops": {"ops", "errors"}, "models": {"models", "ops", "errors"}}
    wrong = [
        f"{file} imports {part}" for file, own, part in imports() if part not in allowed.get(own, {part})
    ]
    assert wrong == []


def test_every_third_party_import_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in wanted}
    imported = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").split(".")[0])
    imported -= sys.stdlib_module_names | {"kairos"} | INSTALLED_WHERE_THERE_IS_A_GPU
    assert {DISTRIBUTIONS.get(name, name) for name in imported} | USED_BY_OTHERS == declared


def test_the_public_names_are_pinned() -> None:
    assert set(kairos.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(kairos, name) is not None


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, kairos\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} imported' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_nothing_is_printed_outside_the_command_line() -> None:
    printing = [
        str(file.relative_to(ROOT))
        for file in PACKAGE.rglob("*.py")
        if re.search(r"^\s*print\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert printing == []


def test_the_reference_of_the_command_line_is_current() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from cli_reference import TARGET, reference
    finally:
        sys.path.pop(0)
    assert TARGET.read_text(encoding="utf-8") == reference(), "run python tools/cli_reference.py"


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "pyproject.toml", "constraints.txt", ".ci/run"])
def test_the_repository_carries(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_readmes_two_commands_are_those_that_ci_and_the_package_know() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install -c constraints.txt . && kairos generate "a red ball' in readme
    assert 'pip install -c constraints.txt ".[test]" && pytest' in readme
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '-c constraints.txt ".[test]"' in ci
    assert "\npytest || status=1\n" in ci
