"""What every process builds before a run, and what it says about bad input: real files, a real (tiny) CLIP."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_dualpriv.config import plans
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.schema import ConfigValue, RunConfig, app_defaults
from fl_dualpriv.data.load import load_data
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.learners.rows import Batches, per_example_gradients
from fl_dualpriv.privacy.clipping import clipped_sum
from fl_dualpriv.tasks.base import run_folder
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.disclosure import may_score
from fl_dualpriv.tasks.images import ImageTask

DEFAULTS = app_defaults(Path(__file__).parents[3])
CLASSES = ("cat", "dog", "red_bus", "tree")


def write_images(folder: Path, per_class: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")


def write_splits(root: Path) -> Path:
    for i, (split, count) in enumerate({"train": 6, "val": 1, "test": 2}.items()):
        write_images(root / split, count, seed=i)
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("images"))


Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(images: Path, tiny_clip_dir: Path) -> Configure:
    def make(changes: dict[str, ConfigValue] | None = None, path: Path = images) -> RunConfig:
        base: dict[str, Any] = {
            "population": 3,
            "rounds": 2,
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.delta": 1e-3,
            "data.ref": "folder",
            "data.path": str(path),
            "data.partition": "iid",
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "resources.device": "cpu",
            "resources.feature-cache": "off",
        }
        return RunConfig.from_run_config(DEFAULTS | base | (changes or {}))

    return make


def test_a_task_divides_all_images_and_gives_unit_features(configure: Configure):
    task = build_task(configure())
    assert sorted(np.concatenate(task.partitions).tolist()) == list(range(24))  # 4 classes x 6
    data = task.client_data(0)
    assert data.num_examples == len(task.partitions[0]) == 8
    torch.testing.assert_close(data.features.norm(dim=1), torch.ones(8))
    assert task.held_classes(0).tolist() == sorted(set(data.labels.tolist()))
    assert task.num_examples(0) == 8
    assert task.logit_scale == task.backbone.logit_scale
    assert (task.held_out("test").num_examples, task.held_out("val").num_examples) == (8, 4)


def test_class_names_are_readable(configure: Configure):
    assert build_task(configure()).data.class_names == ("cat", "dog", "red bus", "tree")


def test_the_mean_of_the_candidates_is_a_start(configure: Configure):
    changes: dict[str, ConfigValue] = {"prompt.candidates": "a photo of a {} | art {}", "prompt.n-ctx": 5}
    task = build_task(configure(changes | {"prompt.init": "mean"}))
    contexts = task.candidates(configure(changes).prompt)
    torch.testing.assert_close(task.initial_prompt(configure(changes | {"prompt.init": "mean"})), contexts.mean(dim=0))
    torch.testing.assert_close(task.initial_prompt(configure(changes)), contexts[0])  # the template, filled in front
    selected = task.initial_prompt(configure(changes | {"prompt.init": "select"}))
    torch.testing.assert_close(selected, contexts.mean(dim=0))
    with pytest.raises(ConfigError, match="1 template that fits; give two or more"):
        build_task(configure({"prompt.candidates": "a photo of a {}", "prompt.init": "select"}))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt.n-ctx": 40, "prompt.rank": 33, "prompt.init": "random"},
            r"prompt\.rank = 33; a prompt of 40 x 32 has rank at most 32",
        ),
        ({"prompt.n-ctx": 3}, r"prompt\.n-ctx = 3, but the template has 4 tokens .* set prompt\.n-ctx = 4"),
        ({"prompt.n-ctx": 30, "prompt.init": "random"}, r"the text tower takes 32; set prompt\.n-ctx <= 28"),
        ({"population": 25}, "population = 25: there are only 24 training images"),
        ({"backbone.name": "local-dir:/no/such/model"}, "no/such/model"),
    ],
    ids=["rank above ctx_dim", "template length", "prompt too long", "more clients than images", "no model"],
)
def test_what_does_not_fit_is_one_clear_error(configure: Configure, changes: dict[str, ConfigValue], message: str):
    with pytest.raises(ConfigError, match=message):
        build_task(configure(changes))


def test_a_missing_path_is_named(configure: Configure, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"data.path.*{re.escape(str(tmp_path / 'none'))}.* does not exist"):
        build_task(configure(path=tmp_path / "none"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"class-names": {"cat": "cat", "dog": "dog", "tree": "tree", "train": "train"}},
            "missing red_bus; extra train",
        ),
        ({"template": "no place for a name"}, "exactly one {}"),
        (
            {"class-names": {"cat": "cat " * 30, "dog": "dog", "red_bus": "bus", "tree": "tree"}},
            "the text tower takes 32.* shorten the names",
        ),
    ],
    ids=["names do not match", "template", "long name"],
)
def test_a_classes_file_that_does_not_fit(configure: Configure, tmp_path: Path, document: Any, message: str):
    (tmp_path / "classes.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        build_task(configure({"data.classes": str(tmp_path / "classes.json")}))


@pytest.mark.parametrize(("delta", "fits"), [(0.13, False), (0.125, False), (0.124, True)])
def test_delta_of_one_over_n_is_refused(configure: Configure, delta: float, fits: bool):
    config = configure({"privacy.record.delta": delta})  # 8 records at every client
    if fits:
        build_task(config)
    else:
        with pytest.raises(PrivacyError, match=rf"delta = {delta} with 8 records .* below 1/8"):
            build_task(config)


def test_delta_of_one_over_the_population_is_refused(configure: Configure):
    config = configure(
        {
            "privacy.record.mechanism": "none",
            "privacy.client.mechanism": "gaussian",
            "privacy.client.calibrate-to": "noise-multiplier",
            "privacy.client.expected-cohort": 2.0,
            "privacy.client.delta": 0.5,  # "one client in two may be exposed", population 3
        }
    )
    with pytest.raises(PrivacyError):
        build_task(config)


# --- records that cannot be read --------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    root = write_splits(tmp_path / "damaged")
    (root / "train" / "dog" / "02.png").write_bytes(b"not a picture")
    return root


def test_without_dp_an_unreadable_image_is_one_error_that_names_it(configure: Configure, damaged: Path):
    with pytest.raises(ConfigError, match=r"1 of 36 images cannot be used.*\n.*dog/02\.png"):
        build_task(configure({"privacy.record.mechanism": "none"}, damaged))


def clean_sum(task: ImageTask, partition_id: int, keep: torch.Tensor | None = None) -> torch.Tensor:
    data = task.client_data(partition_id)
    x, y = data.features, data.labels
    if keep is not None:
        x, y = x[keep], y[keep]
    prompt = task.text.template_context(4)
    features = task.text.tower(prompt[None])
    rows = per_example_gradients(features, Batches.of((x, y)), task.logit_scale, workspace_bytes=2**20)
    return clipped_sum(rows[0], 0.1).value


def test_under_dp_an_unreadable_image_stays_counted_and_contributes_zero(
    configure: Configure, damaged: Path, images: Path
):
    bad, good = build_task(configure(path=damaged)), build_task(configure())
    sizes = [bad.client_data(i).num_examples for i in range(3)]
    assert sizes == [good.client_data(i).num_examples for i in range(3)] == [8, 8, 8]
    rows = [~torch.isfinite(bad.client_data(i).features).all(dim=1) for i in range(3)]
    assert sum(int(r.sum()) for r in rows) == 1
    for i in range(3):
        # the same sum as without that record; batches of other sizes round differently in float32
        torch.testing.assert_close(clean_sum(bad, i), clean_sum(good, i, ~rows[i]), atol=1e-6, rtol=1e-4)
    (owner,) = [i for i in range(3) if bool(rows[i].any())]
    assert float((clean_sum(good, owner) - clean_sum(bad, owner)).norm()) > 1e-3  # it would have counted


def test_an_image_that_decodes_but_cannot_be_resized_is_a_zero_too(configure: Configure, tmp_path: Path):
    # 70 million pixels in one row: the resize of the shorter side would ask for terabytes
    root = write_splits(tmp_path / "thin")
    Image.new("1", (70_000_000, 1)).save(root / "train" / "dog" / "02.png")
    task = build_task(configure(path=root))
    assert sum(int(task.client_data(i).features.isnan().any(dim=1).sum()) for i in range(3)) == 1
    assert sum(task.client_data(i).num_examples for i in range(3)) == 24


def test_without_dp_an_image_that_cannot_be_resized_is_refused_by_name(configure: Configure, tmp_path: Path):
    config = configure({"privacy.record.mechanism": "none", "population": 1}, root := write_splits(tmp_path / "thin"))
    task = build_task(config)
    for name in ("02", "04"):
        Image.new("RGB", (3300, 1)).save(root / "train" / "dog" / f"{name}.png")
    with pytest.raises(ConfigError, match=r"2 images cannot be used.*\n.*dog/02\.png has 3300 x 1 pixels"):
        task.client_data(0)
    load_data.cache_clear()
    with pytest.raises(ConfigError, match=r"2 of 36 images cannot be used.*\n.*dog/02\.png has 3300 x 1 pixels"):
        build_task(config)


def test_client_level_alone_keeps_a_bad_record_counted(configure: Configure, damaged: Path):
    changes: dict[str, ConfigValue] = {
        "privacy.record.mechanism": "none",
        "privacy.client.mechanism": "gaussian",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.expected-cohort": 2.0,
    }
    task = build_task(configure(changes, damaged))
    assert sum(int(task.client_data(i).features.isnan().any(dim=1).sum()) for i in range(3)) == 1


def test_the_nominal_procedure_refuses_a_bad_record_like_no_dp(configure: Configure, damaged: Path):
    with pytest.raises(ConfigError, match="1 of 36 images cannot be used"):
        build_task(configure({"method": "dpfpl-paper"}, damaged))


def test_a_delta_below_the_accountants_reach_is_refused(configure: Configure):
    with pytest.raises(ConfigError, match=r"privacy.record.delta = 1e-17: must be at least 1e-12"):
        configure({"privacy.record.delta": 1e-17})
    plan = record_level_plan(configure({}))
    assert plan is not None
    with pytest.raises(PrivacyError, match="no finite ε can be shown"):  # whatever the configuration allows
        plans._bounded(dataclasses.replace(plan, noise_multiplier=1e-120), plan.releases, "privacy.record")


@pytest.mark.parametrize(
    ("setting", "own_folder", "scored"), [("auto", True, True), ("public", False, True), ("auto", False, False)]
)
def test_scores_leave_under_dp_only_from_public_images(
    configure: Configure, tmp_path: Path, setting: str, own_folder: bool, scored: bool
):
    folder = tmp_path / "some"
    # A flat folder may hold a class that is called "test": its images are training images all the same.
    for name in ("train/cat", "train/dog", "test/cat", "test/dog") if own_folder else ("cat", "dog", "test"):
        (folder / name).mkdir(parents=True)
    changes: dict[str, ConfigValue] = {"evaluation.held-out-data": setting, "evaluation.split": "test"}
    assert may_score(configure(changes, folder)) == scored
    assert may_score(configure(changes | {"privacy.record.mechanism": "none"}, folder))


# --- what is kept, and what is made anew ------------------------------------------------------------------------------


def features(task: ImageTask) -> torch.Tensor:
    return torch.cat([task.client_data(i).features for i in range(3)])


def test_the_feature_cache_changes_no_bit_and_is_part_of_the_task(configure: Configure, damaged: Path, tmp_path: Path):
    off = build_task(configure(path=damaged))
    on = [build_task(configure({"resources.feature-cache": str(tmp_path / name)}, damaged)) for name in ("one", "two")]
    for task in on:
        assert torch.equal(features(task).nan_to_num(7.0), features(off).nan_to_num(7.0))
    assert off.cache_root is None
    assert [task.cache_root for task in on] == [tmp_path / "one", tmp_path / "two"]
    assert [path.name for path in (tmp_path / "one").iterdir()] == [path.name for path in (tmp_path / "two").iterdir()]


def test_a_task_holds_nothing_per_client(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    task = build_task(configure({"population": 24}))
    task.client_data(0)
    monkeypatch.setattr("fl_dualpriv.features.images.encode_images", None)  # whoever calls it now fails
    for i in range(24):
        assert task.client_data(i).num_examples == task.num_examples(i) == len(task.held_classes(i)) == 1
    assert task.client_data(3) is not task.client_data(3)


def test_public_metadata_reads_no_image(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fl_dualpriv.features.images.encode_images", None)
    task = build_task(configure({"seed": 11}))
    assert [task.num_examples(i) for i in range(3)] == [8, 8, 8]
    assert sorted({c for i in range(3) for c in task.held_classes(i).tolist()}) == [0, 1, 2, 3]


def test_flips_are_new_each_round_and_the_same_again_for_a_seed(configure: Configure, tmp_path: Path):
    changes: dict[str, ConfigValue] = {"data.augmentation": "flip", "resources.feature-cache": str(tmp_path)}
    plain, task = build_task(configure()), build_task(configure(changes))
    rounds = [task.client_data(0, r).features for r in range(1, 6)]
    assert torch.equal(task.client_data(0, 1).features, rounds[0])
    assert len({tuple(r.flatten().tolist()) for r in rounds}) == 5
    assert not list(tmp_path.iterdir())  # nothing is kept
    # Each record is as it is or mirrored, by its own coin: in 5 rounds of 8 records both happen.
    same = torch.stack([(r - plain.client_data(0).features).abs().amax(dim=1) < 1e-5 for r in rounds])
    assert 0 < int(same.sum()) < 40
    assert any(0 < int(row.sum()) < 8 for row in same)
    # Another seed throws other coins. (It divides the images otherwise too, so it is given to the same division.)
    other = dataclasses.replace(task, seed=1)
    assert not torch.equal(other.client_data(0, 1).features, rounds[0])


def test_held_out_images_are_never_mirrored(configure: Configure):
    plain, task = build_task(configure()), build_task(configure({"data.augmentation": "flip"}))
    for split in ("val", "test"):
        assert torch.equal(task.held_out(split).features, plain.held_out(split).features)


def test_a_mirrored_record_is_a_function_of_itself(configure: Configure, damaged: Path):
    # The guarantee of `client_data`: what one record is moves no other record's features.
    changes: dict[str, ConfigValue] = {"data.augmentation": "flip"}
    good, bad = build_task(configure(changes)), build_task(configure(changes, damaged))
    for i in range(3):
        one, other = good.client_data(i, 1).features, bad.client_data(i, 1).features
        usable = torch.isfinite(other).all(dim=1)
        torch.testing.assert_close(one[usable], other[usable], atol=1e-6, rtol=0)


def test_precision_is_part_of_the_task(configure: Configure):
    exact, fast = build_task(configure()), build_task(configure({"backbone.precision": "bf16"}))
    difference = (exact.client_data(0).features - fast.client_data(0).features).abs().max()
    assert 0 < float(difference) < 0.05


# --- plans and small things -------------------------------------------------------------------------------------------


def test_the_record_level_plan_counts_every_local_step(configure: Configure):
    plan = record_level_plan(configure({"rounds": 7, "train.local-steps": 3, "privacy.record.noise-multiplier": 2.5}))
    assert plan is not None
    assert (plan.releases, plan.noise_multiplier, plan.sampling_rate) == (21, 2.5, 0.15)
    assert plan.personal


def test_a_calibrated_plan_keeps_its_promise(configure: Configure):
    plan = record_level_plan(configure({"privacy.record.calibrate-to": "epsilon", "privacy.record.epsilon": 2.0}))
    assert plan is not None
    assert 1.9 < plan.epsilon() <= 2.0


@pytest.mark.parametrize(
    "changes", [{"method": "zero-shot"}, {"method": "dpfpl-paper"}, {"privacy.record.mechanism": "none"}]
)
def test_no_plan_where_nothing_is_promised(configure: Configure, changes: dict[str, ConfigValue]):
    assert record_level_plan(configure(changes)) is None


def test_the_client_level_plan_samples_the_expected_cohort(configure: Configure):
    assert client_level_plan(configure()) is None
    changes: dict[str, ConfigValue] = {
        "privacy.client.mechanism": "gaussian",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.noise-multiplier": 1.5,
        "privacy.client.expected-cohort": 1.5,
    }
    plan = client_level_plan(configure(changes))
    assert plan is not None
    assert (plan.sampling_rate, plan.rounds, plan.noise_multiplier) == (0.5, 2, 1.5)


def test_the_initial_prompt_is_the_template_or_small_noise(configure: Configure):
    template = configure()
    task = build_task(template)
    assert torch.equal(task.initial_prompt(template), task.text.template_context(4))
    changes: dict[str, ConfigValue] = {"prompt.init": "random", "prompt.n-ctx": 16}
    draws = [task.initial_prompt(configure(changes | {"seed": seed})) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32
    # 512 draws: the standard error of the deviation is 3 %; 5 of them
    assert float(draws[0].std()) == pytest.approx(0.02, rel=0.16)


def test_the_learner_decides_the_tower_and_the_start(configure: Configure):
    context = configure()
    # More ranks than the template has words, and no context of this length: neither matters to the head.
    changes: dict[str, ConfigValue] = {"prompt.learner": "head", "method": "full", "prompt.n-ctx": 9, "prompt.rank": 5}
    head = configure(changes)
    task = build_task(head)
    assert task.tower(context.prompt) is task.text.tower
    assert task.tower(head.prompt) is task.tower(head.prompt) is not task.text.tower
    start = task.initial_prompt(head)
    assert start.shape == (5, 4 + task.backbone.embed_dim)
    assert torch.equal(start, task.initial_prompt(head))
    torch.testing.assert_close(task.tower(head.prompt)(start[None]).values[0], task.text.zero_shot_features())


def test_run_folders_do_not_collide():
    assert run_folder("/somewhere/else", 7) == Path("/somewhere/else")
    assert run_folder("", 7) != run_folder("", 8)
    assert Path.home() in run_folder("", 7).parents
