"""One thread, tiny CLIP models with random weights saved as users save theirs, and the list of planted bugs."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest
import torch

torch.set_num_threads(1)

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""16 patches; open_clip's whole vocabulary, so that its own tokenizer fits."""

PLANTED = "planted bug"
"""Property of a test's report: (what was planted, what caught it)."""
DOCUMENTED = "documented command"
"""Property of a test's report: (place, command, what became of it)."""
_WIDTH = 160


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests/guarantees/test_mutations.py planted, and what caught each, whichever process ran it.

    Likewise what tests/app/test_documented_commands.py ran, and what it skipped.
    """
    caught: dict[str, list[str]] = {}
    commands: list[tuple[str, str, str]] = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == PLANTED and report.when == "call":
                    caught.setdefault(value[0], []).append(value[1])
                if name == DOCUMENTED and report.when == "call":
                    commands.append(tuple(value))
    if commands:
        terminalreporter.section("documented commands")
        for place, command, verdict in commands:
            terminalreporter.write_line(f"{place}: {command}")
            terminalreporter.write_line(f"    {verdict}")
        skipped = sum(verdict.startswith("skipped") for _, _, verdict in commands)
        terminalreporter.write_line(f"{len(commands) - skipped} were run, {skipped} skipped")
    if caught:
        terminalreporter.section("planted bugs, and what caught each")
        for bug, lines in sorted(caught.items()):
            terminalreporter.write_line(bug)
            for line in lines:
                terminalreporter.write_line(f"    caught by {line}"[:_WIDTH])
        terminalreporter.write_line(f"{len(caught)} planted bugs were caught")


def _merge(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        config[key] = _merge(config.get(key, {}), value) if isinstance(value, dict) else value
    return config


@pytest.fixture(scope="session")
def make_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a tiny CLIP with changed settings, ``make_clip_dir({"vision_cfg": {"layers": 2}})``; returns its folder."""
    # Late: most tests need no CLIP, and its import takes seconds.
    from safetensors.torch import save_file

    from fl_dualpriv.models import torchvision_shim

    torchvision_shim.install()
    import open_clip

    def make(changes: dict[str, Any] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("clip")
        config = {"model_cfg": _merge(deepcopy(TINY), changes or {}), "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            # Some of open_clip's initial values are zeros, which would hide a wrong use of them.
            for name, parameter in model.named_parameters():
                # It leaves some of the caption decoder, which no feature reads, to chance.
                if name.startswith("text_decoder") or (parameter.ndim == 1 and not parameter.any()):
                    torch.nn.init.normal_(parameter, std=0.1)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_clip_dir(make_clip_dir: Callable[..., Path]) -> Path:
    """Folder of the tiny CLIP, for ``load_backbone(f"local-dir:{tiny_clip_dir}", ...)``."""
    return make_clip_dir()


@pytest.fixture(scope="session")
def tiny_clip_name(tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny architecture under a name of its own, as a user of open_clip registers one; needs a checkpoint."""
    from fl_dualpriv.models.open_clip import open_clip

    path = tmp_path_factory.mktemp("names") / "Tiny-Test-8.json"
    path.write_text(json.dumps(json.loads((tiny_clip_dir / "open_clip_config.json").read_text())["model_cfg"]))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="session")
def make_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny LLaVA with random weights: ``make_llava_dir(vision="siglip", language="mistral", ...)``."""

    def make(**changes: Any) -> Path:
        from tests.tiny_llava import save_tiny_llava  # late: its library takes seconds

        return save_tiny_llava(tmp_path_factory.mktemp("llava"), **changes)

    return make


@pytest.fixture(scope="session")
def llava_dir(make_llava_dir: Callable[..., Path]) -> Path:
    """Folder of the tiny LLaVA of CLIP and Llama, for ``load_answering_model(f"hf:{llava_dir}", ...)``."""
    return make_llava_dir()


@pytest.fixture
def flower_task() -> None:
    """Messages cannot be made outside a Flower task."""
    from flwr.supercore.task_identity import TaskIdentity  # late: most tests need no Flower

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
