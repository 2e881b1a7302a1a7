"""Imports point one way, folder above folder, and a heavy library has one import site. Read from the sources."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("fl_dualpriv", "strategies", "clients", "simulations")
FILES = sorted(path.relative_to(ROOT).as_posix() for top in (*CODE, "tests") for path in (ROOT / top).rglob("*.py"))

ORDER = (
    "errors",
    "files",
    "metrics",
    "assets",
    "privacy",
    "privacy.filters",
    "methods",
    "config",
    "run",
    "models.pruning",
    "models",
    "towers",
    "data.demo",
    "data",
    "learners",
    "tasks",
    "messages",
    "client",
    "server",
    "flower",
    "publish",
    "node",
    "testing",
    "cli",
)
"""Folders and single modules of the library, from below: each imports itself and what stands before it."""

MAY_IMPORT = {
    "fl_dualpriv": {"fl_dualpriv"},
    "strategies": {"strategies", "fl_dualpriv"},
    "clients": {"clients", "fl_dualpriv"},
    "simulations": {"simulations", "clients", "strategies", "fl_dualpriv"},
}
"""Which of our packages a package may know."""

SITES = {
    "open_clip": {
        "fl_dualpriv/models/open_clip.py",
        "fl_dualpriv/models/tokenizer.py",  # its tokenizer's base class
        "simulations/make_demo_assets.py",  # trains the demo model; no part of a run
        "simulations/make_cifar10_clip.py",  # likewise
    },
    "transformers": {
        "fl_dualpriv/models/transformers.py",
        "fl_dualpriv/models/llava.py",
        "simulations/make_vqa_assets.py",  # trains the demo model; no part of a run
        "simulations/vqa_model.py",
        "simulations/benchmarks/llava_models.py",  # random weights in given shapes
    },
    "datasets": {"fl_dualpriv/data/hub.py"},
    "peft": {"fl_dualpriv/models/lora.py"},
    "torchvision": set(),  # only ever through open_clip and transformers, behind the shim
    "opacus": {  # its per-sample gradients are compared with ours
        "simulations/benchmarks/per_example.py",
        "simulations/benchmarks/mllm_methods.py",
    },
    "dp_accounting": {
        "fl_dualpriv/privacy/accounting.py",
        "simulations/benchmarks/growth.py",  # asks it directly, to compare with what a run reports
    },
    "matplotlib": {"fl_dualpriv/run/recorder.py", "simulations/attacks/report.py"},
    "mpmath": {"fl_dualpriv/privacy/integer.py"},
    "ray": set(),  # Flower drives it
    "typer": {
        "fl_dualpriv/cli/main.py",
        "fl_dualpriv/cli/audit.py",
        "fl_dualpriv/cli/budget.py",
        "fl_dualpriv/cli/export.py",
        "fl_dualpriv/cli/new_strategy.py",
        "fl_dualpriv/cli/node.py",
        "fl_dualpriv/cli/predict.py",
    },
}
"""Where each heavy library may be imported; PIL, whole folders, is checked below."""


ASSET_SCRIPTS = {
    "simulations/make_demo_assets.py",
    "simulations/vqa_questions.py",
    "simulations/cifar10_images.py",
    "simulations/make_cifar10.py",
}


@functools.cache
def imports(file: str) -> frozenset[str]:
    """Dotted names of all imported modules, wherever in the file they stand."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def tops(file: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


def of(*folders: str) -> list[str]:
    return [file for file in FILES if file.startswith(tuple(f"{folder}/" for folder in folders))]


def test_there_is_something_to_check():
    assert {
        "fl_dualpriv/server/strategy.py",
        "clients/app.py",
        "strategies/dpfpl.py",
        "simulations/server_app.py",
    } <= set(FILES)
    assert "fl_dualpriv.privacy.clipping" in imports("clients/dualpriv.py")
    assert "open_clip" in tops("fl_dualpriv/models/tokenizer.py")  # an import inside a function counts


@pytest.mark.parametrize("file", of(*CODE))
def test_imports_point_one_way(file: str):
    assert tops(file) & set(CODE) <= MAY_IMPORT[file.partition("/")[0]]


def test_privacy_knows_no_federation_no_model_and_no_configuration():
    # Of a prompt learner the types alone: class features and their vector-Jacobian products.
    allowed = {"fl_dualpriv.privacy", "fl_dualpriv.errors", "fl_dualpriv.towers.base"}
    for file in of("fl_dualpriv/privacy"):
        assert not tops(file) & {"flwr", "open_clip", "transformers", "ray", "PIL", "opacus"}, file
        ours = {name for name in imports(file) if name.startswith("fl_dualpriv")}
        assert all(any(name == a or name.startswith(f"{a}.") for a in allowed) for name in ours), file


@pytest.mark.parametrize("library", SITES)
def test_heavy_libraries_have_their_sites(library: str):
    assert {file for file in of(*CODE) if library in tops(file)} <= SITES[library]


def test_images_are_opened_by_data_and_backbones_alone():
    users = {file for file in of(*CODE) if "PIL" in tops(file)} - ASSET_SCRIPTS
    assert {Path(file).parent.as_posix() for file in users} == {"fl_dualpriv/data", "fl_dualpriv/backbones"}


def test_messages_are_read_and_written_by_wire_alone():
    # Keys inside messages: whoever indexes records knows them.
    readers = [f for f in of(*CODE) if any(w in (ROOT / f).read_text() for w in ("array_records", "metric_records"))]
    assert readers == ["fl_dualpriv/messages.py"]


@pytest.mark.parametrize("module", ["flwr.common", "flwr.client", "flwr.server"])
def test_only_public_names_of_flower(module: str):
    assert not [f for f in of(*CODE) for n in imports(f) if n == module or n.startswith(f"{module}.")]


def test_no_relative_imports():
    for file in FILES:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level], file


def test_configuration_imports_the_standard_library_only():
    assert tops("fl_dualpriv/config/schema.py") | tops("fl_dualpriv/config/ranges.py") <= {
        *("dataclasses", "difflib", "functools", "tomllib", "collections", "math", "json", "re", "pathlib", "typing"),
        "fl_dualpriv",
    }


def test_the_drivers_view_of_the_client_app_is_light():
    # Flower's simulation driver imports the ClientApp and needs no torch: only function bodies may import it.
    tree = ast.parse((ROOT / "clients/app.py").read_text(encoding="utf-8"))
    at_import = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    at_import |= {alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    assert at_import == {"logging", "collections.abc", "pathlib", "typing", "flwr.app", "flwr.clientapp"}


@pytest.mark.parametrize("file", FILES)
def test_files_are_short(file: str):
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 400


def test_tests_are_no_packages():
    assert not [file for file in FILES if file.startswith("tests/") and file.endswith("__init__.py")]
