"""Imports point one way, folder above folder, and a heavy library has one import site. Read from the sources."""

import ast
import functools
import graphlib
import re
from pathlib import Path

import pytest

import fl_dualpriv

ROOT = Path(__file__).parents[2]
APP = ("strategies", "clients", "simulations")
CODE = ("fl_dualpriv", *APP, "benchmarks", "attacks", "tools")
FILES = sorted(path.relative_to(ROOT).as_posix() for top in (*CODE, "tests") for path in (ROOT / top).rglob("*.py"))

MAY_IMPORT = {
    "fl_dualpriv": {"fl_dualpriv"},
    "strategies": {"strategies", "fl_dualpriv"},
    "clients": {"clients", "fl_dualpriv"},
    "simulations": {"simulations", "clients", "strategies", "fl_dualpriv"},
    "benchmarks": {"benchmarks", "simulations", "clients", "strategies", "fl_dualpriv"},
    "attacks": {"attacks", "simulations", "clients", "strategies", "fl_dualpriv"},
    "tools": {"tools", "simulations", "fl_dualpriv"},
}
"""The packages of ours that a package may import."""

ORDER = (
    "errors",
    "files",
    "metrics",
    "assets",
    "privacy",
    "privacy.filters",
    "methods",
    "config",
    "tracking",
    "run",
    "models.embedded",
    "models.pruning",
    "models.text",
    "models",
    "towers",
    "data.formats",
    "data.demo",
    "data",
    "features",
    "learners",
    "tasks",
    "messages",
    "client",
    "server",
    "flower",
    "report",
    "sweep",
    "publish",
    "node",
    "testing",
    "cli",
)
"""Folders and single modules of the library, from the lowest to the highest. Each imports itself and lower ones."""

PUBLIC = "fl_dualpriv"  # its face: all may read the version, and no module its other names
LOADED_BY_THE_FACE = {f"fl_dualpriv.{name}" for name in fl_dualpriv._HOMES}

MOST_FILES, MOST_ROOT_MODULES = 16, 6

SITES = {
    "open_clip": {
        "fl_dualpriv/models/open_clip.py",
        "fl_dualpriv/models/tokenizer.py",  # its tokenizer's base class
        "tools/make_demo_assets.py",  # trains the demo model; no part of a run
        "tools/make_shelf_assets.py",  # likewise
        "tools/make_paper_shapes.py",  # a model with random weights
        "tools/make_cifar10_clip.py",  # likewise
    },
    "transformers": {
        "fl_dualpriv/models/transformers.py",
        "fl_dualpriv/models/llava.py",
        "tools/make_vqa_assets.py",  # trains the demo model; no part of a run
        "tools/vqa_model.py",
        "benchmarks/llava_models.py",  # random weights in given shapes
    },
    "datasets": {"fl_dualpriv/data/hub.py"},
    "flwr_datasets": {"fl_dualpriv/data/partitioners.py"},
    "pydicom": {"fl_dualpriv/data/formats/pixels.py"},
    "pillow_heif": {"fl_dualpriv/data/formats/pixels.py"},
    "peft": {"fl_dualpriv/models/lora.py"},
    "torchvision": {"fl_dualpriv/models/torchvision_shim.py"},  # others only through open_clip and transformers
    "opacus": {
        "fl_dualpriv/learners/module.py",  # rows of users' modules
        "fl_dualpriv/models/lora.py",  # rows of LoRA factors
        "fl_dualpriv/run/witness.py",  # its accountant, beside ours
        # Its per-sample gradients are compared with ours:
        "benchmarks/per_example.py",
        "benchmarks/mllm_methods.py",
    },
    "dp_accounting": {
        "fl_dualpriv/privacy/accounting.py",
        "benchmarks/growth.py",  # asks it directly, to compare with what a run reports
    },
    "matplotlib": {
        "fl_dualpriv/run/recorder.py",
        "fl_dualpriv/report/figures.py",
        "simulations/curve.py",
        "attacks/report.py",
    },
    "mpmath": {"fl_dualpriv/privacy/integer.py"},
    "ray": {"fl_dualpriv/sweep/schedule.py"},  # of a run Flower drives it
}
"""Files that may import a heavy library. PIL and typer have a folder each, see below."""

ASSET_SCRIPTS = {
    "tools/make_demo_assets.py",
    "tools/make_shelf_assets.py",
    "tools/make_large_shelf.py",
    "tools/make_paper_shapes.py",
    "tools/vqa_questions.py",
    "tools/cifar10_images.py",
    "tools/make_cifar10.py",
}


def _for_types(tree: ast.AST) -> set[ast.AST]:
    """The nodes under ``if TYPE_CHECKING``, which no program executes."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports_of(source: str, *, of_types: bool = True) -> set[str]:
    """Dotted names of all imported modules, at the top and inside functions; without ``of_types`` executed ones."""
    tree = ast.parse(source)
    skipped = set() if of_types else _for_types(tree)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


@functools.cache
def imports(file: str) -> frozenset[str]:
    return frozenset(imports_of((ROOT / file).read_text(encoding="utf-8")))


def tops(file: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


def of(*folders: str) -> list[str]:
    return [file for file in FILES if file.startswith(tuple(f"{folder}/" for folder in folders))]


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(file): file for file in of(*CODE)}


def part_of(module: str) -> str:
    """The entry of `ORDER` that a module of the library belongs to."""
    name = module.removeprefix("fl_dualpriv.")
    is_folder = MODULES[module].endswith("__init__.py")
    return name if is_folder or "." not in name else name.rpartition(".")[0]


def modules_in(names: set[str]) -> set[str]:
    """The modules of ours among imported names; ``from package import module`` counts as the module only."""
    found = names & MODULES.keys()
    return {
        m
        for m in found
        if not (MODULES[m].endswith("__init__.py") and any(f != m and f.startswith(f"{m}.") for f in found))
    }


def upward_imports(module: str, source: str) -> list[str]:
    """The executed imports of a module that point to a higher part."""
    own = ORDER.index(part_of(module))
    lower = modules_in(imports_of(source, of_types=False)) - {PUBLIC}
    ours = {name for name in lower if name.startswith("fl_dualpriv.")}
    public = {name for name in imports_of(source, of_types=False) if name in LOADED_BY_THE_FACE}
    return sorted(public | {name for name in ours if ORDER.index(part_of(name)) > own})


def test_there_is_something_to_check():
    assert {"fl_dualpriv/server/strategy.py", "clients/app.py", "strategies/dpfpl.py"} <= set(FILES)
    assert "fl_dualpriv.privacy.clipping" in imports("fl_dualpriv/client/step.py")
    assert "open_clip" in tops("fl_dualpriv/models/tokenizer.py")  # an import inside a function counts


@pytest.mark.parametrize("package", CODE)
def test_imports_point_one_way(package: str):
    wrong = {file: more for file in of(package) if (more := tops(file) & set(CODE) - MAY_IMPORT[package])}
    assert wrong == {}


def test_every_folder_has_its_place():
    assert {part_of(module) for module in MODULES if module.startswith("fl_dualpriv.")} == set(ORDER)


def test_no_folder_imports_a_higher_one():
    files = [file for file in of("fl_dualpriv") if file != "fl_dualpriv/__init__.py"]
    upward = {file: upward_imports(module_of(file), (ROOT / file).read_text(encoding="utf-8")) for file in files}
    assert {file: names for file, names in upward.items() if names} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "from fl_dualpriv.server.strategy import RoundStrategy",
        "def f():\n    from fl_dualpriv.server.strategy import RoundStrategy",
        "def f():\n    import fl_dualpriv.server.strategy",
        "import importlib\nm = importlib.import_module('fl_dualpriv.server.strategy')",
        "class A:\n    def f(self):\n        from fl_dualpriv.server import strategy",
    ],
)
def test_a_planted_upward_import_is_noticed(planted: str):
    assert upward_imports("fl_dualpriv.client.step", planted) == ["fl_dualpriv.server.strategy"]
    assert upward_imports("fl_dualpriv.server.rounds", planted) == []


def test_the_librarys_modules_do_not_use_its_face():
    assert upward_imports("fl_dualpriv.client.step", "from fl_dualpriv import load_prompt") == [
        "fl_dualpriv.load_prompt"
    ]


def test_an_import_for_types_is_not_executed():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fl_dualpriv.server.strategy import X\n"
    assert upward_imports("fl_dualpriv.client.step", source) == []


def test_no_module_imports_itself_through_others():
    graph = {
        module: modules_in(imports_of((ROOT / file).read_text(encoding="utf-8"), of_types=False)) - {module, PUBLIC}
        for module, file in MODULES.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_folders_are_small():
    folders: dict[str, list[str]] = {}
    for file in of("fl_dualpriv"):
        folders.setdefault(Path(file).parent.as_posix(), []).append(Path(file).name)
    assert len(folders.pop("fl_dualpriv")) <= MOST_ROOT_MODULES
    assert {folder: len(files) for folder, files in folders.items() if len(files) > MOST_FILES} == {}


def test_privacy_knows_no_federation_no_model_and_no_configuration():
    for file in of("fl_dualpriv/privacy"):
        assert not tops(file) & {"flwr", "open_clip", "transformers", "ray", "PIL", "opacus"}, file
        ours = {name for name in imports(file) if name.startswith("fl_dualpriv.")}
        assert all(name.startswith(("fl_dualpriv.privacy", "fl_dualpriv.errors")) for name in ours), file


@pytest.mark.parametrize("library", SITES)
def test_heavy_libraries_have_their_sites(library: str):
    assert {file for file in of(*CODE) if library in tops(file)} <= SITES[library]


def test_images_are_opened_by_data_and_models_only():
    users = {file for file in of(*CODE) if "PIL" in tops(file)} - ASSET_SCRIPTS
    folders = {Path(file).parent.as_posix() for file in users}
    of_data = {"fl_dualpriv/data", "fl_dualpriv/data/demo", "fl_dualpriv/data/formats"}
    assert folders == of_data | {"fl_dualpriv/features", "fl_dualpriv/models"}


def test_commands_only_know_typer():
    assert {Path(file).parent.as_posix() for file in of(*CODE) if "typer" in tops(file)} == {"fl_dualpriv/cli"}


def test_keys_of_messages_are_known_to_one_module():
    readers = [f for f in of(*CODE) if any(w in (ROOT / f).read_text() for w in ("array_records", "metric_records"))]
    assert readers == ["fl_dualpriv/messages.py"]


@pytest.mark.parametrize("module", ["flwr.common", "flwr.client", "flwr.server"])
def test_only_public_names_of_flower(module: str):
    assert not [f for f in of(*CODE) for n in imports(f) if n == module or n.startswith(f"{module}.")]


def test_no_relative_imports():
    # A line can begin with "from ." only in an import or in a text, which no file of ours has.
    assert not [file for file in FILES if re.search(r"(?m)^\s*from \.", (ROOT / file).read_text(encoding="utf-8"))]


def test_the_schema_of_the_configuration_imports_the_standard_library_only():
    light = ("schema", "ranges", "rules", "method_rules", "client_level_rules", "class_prior_rules", "methods")
    for name in light:
        assert tops(f"fl_dualpriv/config/{name}.py") <= {
            *("dataclasses", "difflib", "functools", "tomllib", "collections", "math", "json", "re", "pathlib"),
            *("typing", "fl_dualpriv"),
        }


def test_the_drivers_view_of_the_client_app_is_light():
    # Flower's simulation driver imports the ClientApp and needs no torch: only function bodies may import it.
    tree = ast.parse((ROOT / "clients/app.py").read_text(encoding="utf-8"))
    at_import = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    at_import |= {alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    assert at_import == {"typing", "flwr.app", "flwr.clientapp", "fl_dualpriv.node.answer"}


@pytest.mark.parametrize(("file", "lines"), [("clients/app.py", 60), ("simulations/federation.py", 120)])
def test_the_app_is_short(file: str, lines: int):
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= lines


def test_tests_are_no_packages():
    assert not [file for file in FILES if file.startswith("tests/") and file.endswith("__init__.py")]
