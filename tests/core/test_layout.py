"""Laws of the house: which room may import which, and what may lie at the door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("diffsr_core", "pipelines", "jobs")
JOBS = ("pairs", "training", "evaluation", "promotion", "upscaling", "manipulation", "one_image", "importing")
TOP_LEVEL = {
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "diffsr_core",
    "pipelines",
    "jobs",
    "infra",
    "tests",
}


def sources(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"{room} holds no Python"
    return found


def imports(text: str) -> Iterator[str]:
    """Dotted names of all that the source imports, inside functions too: `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def roots(room: str) -> dict[str, set[str]]:
    return {
        str(path.relative_to(ROOT)): {name.split(".")[0] for name in imports(path.read_text("utf-8"))}
        for path in sources(room)
    }


def test_the_reader_of_imports_sees_every_way_to_import() -> None:
    text = "import a.b\nfrom c import d\ndef f():\n    from .e import g\n    from h import *\n    import_module('i.j')"
    assert sorted(imports(text)) == sorted(["a.b", "c", "c.d", "i.j", ".e", ".e.g", "h", "h.*"])


def test_the_core_imports_torch_numpy_safetensors_and_the_standard_library() -> None:
    allowed = {"torch", "numpy", "safetensors", "diffsr_core", *sys.stdlib_module_names}
    assert {path: names - allowed for path, names in roots("diffsr_core").items() if names - allowed} == {}


def test_the_pipelines_import_neither_the_jobs_nor_the_tests() -> None:
    assert {path: names for path, names in roots("pipelines").items() if names & {"jobs", "tests", "infra"}} == {}


def test_the_jobs_import_the_pipelines_and_the_standard_library() -> None:
    allowed = {"pipelines", *sys.stdlib_module_names}
    assert {path: names - allowed for path, names in roots("jobs").items() if names - allowed} == {}


def test_the_jobs_and_tools_do_not_import_one_another() -> None:
    from pipelines import cli

    assert {entry.module for entry in cli.JOBS.values()} == {f"pipelines.{job}" for job in JOBS}
    for job in JOBS:
        others = {f"pipelines.{other}" for other in JOBS if other != job}
        assert others.isdisjoint(imports((ROOT / "pipelines" / f"{job}.py").read_text("utf-8"))), job


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_absolute_and_by_name(room: str) -> None:
    for path in sources(room):
        bad = [name for name in imports(path.read_text("utf-8")) if name.startswith(".") or name.endswith(".*")]
        assert not bad, f"{path.relative_to(ROOT)}: {bad}"


def test_nothing_can_load_a_pickle() -> None:
    # Law 5. torch.load may be called with weights_only=True alone, which unpickles tensors and nothing else.
    for room in ROOMS:
        for path in sources(room):
            text = path.read_text("utf-8")
            names = {name.split(".")[0] for name in imports(text)}
            assert names.isdisjoint({"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}), path.name
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno}"


def test_the_top_of_the_repository_holds_what_is_agreed_and_dotfiles() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout, so what belongs to the repository is not known")
    top = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
    assert {"pyproject.toml", *ROOMS} <= top


def test_help_pays_for_no_framework() -> None:
    script = "import sys, pipelines.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert "pipelines" in loaded
    assert loaded.isdisjoint({"ray", "torch", "mlflow", "pyarrow", "numpy"})


def test_importing_the_core_starts_nothing() -> None:
    # No thread, no child, no output, and the global generator is where it was.
    names = ", ".join(
        f"diffsr_core.{path.stem}" for path in sources("diffsr_core") if path.parent.name == "diffsr_core"
    )
    script = (
        "import threading, torch; torch.manual_seed(0); before = torch.get_rng_state()\n"
        f"import {names.replace('diffsr_core.__init__, ', '')}\n"
        "assert torch.equal(before, torch.get_rng_state()); assert threading.active_count() == 1"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
