"""Data enter a client's state and upload through the noised release alone: fix the release, and they cannot be seen.

This is the proof that masks, carriers, factors and residual are post-processing, run as a test: any use of the clean
sum (a mask ranked on it, carriers taken from it) makes two unrelated data sets give different results.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.client.pruning import KEEP_ALL
from tests.guarantees import run_checks, step_checks
from tests.guarantees.run_checks import Federation


@pytest.mark.parametrize("noise_space", ["prompt", "feature"])
@pytest.mark.parametrize("keep_ratio", [0.5, 1.0])
@pytest.mark.parametrize("method", ["dpfpl", "lowrank", "full", "local-only", "promptfl"])
def test_with_the_release_fixed_two_data_sets_cannot_be_told_apart(
    method: str, keep_ratio: float, noise_space: Any
) -> None:
    step_checks.data_enter_through_the_release_alone(method, replace(KEEP_ALL, keep_ratio=keep_ratio), noise_space)


def test_a_run_never_asks_for_the_same_stream_twice(tmp_path: Path, tiny_clip_dir: Path) -> None:
    images = run_checks.write_images(tmp_path / "images")
    run_checks.no_stream_is_asked_for_twice(Federation(folder=tmp_path, images=images, clip=tiny_clip_dir))
