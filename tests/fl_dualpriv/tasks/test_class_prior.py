"""Class priors by hand, the owners' file and all that can be wrong with it, and how a prompt with a prior is scored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_dualpriv.client.node import Node, RunContext
from fl_dualpriv.client.state import fresh_state
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.messages import EvaluateRequest
from fl_dualpriv.metrics import ScoreTable, count_logits
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.class_prior import held_shares, log_prior, record_counts
from fl_dualpriv.tasks.images import ImageTask
from fl_dualpriv.tasks.survey import survey

DEFAULTS = app_defaults(Path(__file__).parents[3])
CLASSES = ("cat", "dog", "red_bus", "tree")  # "red_bus" is named "red bus"
SHARES = """
[client-0]
cat = 0.75
dog = 0.25
[client-1]
"red bus" = 0.5
tree = 0.5
"""
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in {"train": 6, "val": 1, "test": 5}.items():
        for place, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count + place if split == "train" else count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.fixture
def configure(images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Configure:
    def make(prior: str, shares: str = "", **changes: Any) -> RunConfig:
        file = tmp_path / "shares.toml"
        file.write_text(shares, encoding="utf-8")
        base: dict[str, Any] = {
            "population": 2,
            "rounds": 2,
            "supernodes": 1,
            "train.class-prior": prior,
            "data.class-shares": str(file) if prior == "declared" else "",
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.delta": 1e-3,
            "privacy.record.mechanism": "none" if prior == "exact" else "gaussian",
            "data.ref": "folder",
            "data.path": str(images),
            "data.partition": "by-class",
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "resources.device": "cpu",
            "resources.feature-cache": "off",
        }
        return RunConfig.from_run_config(DEFAULTS | base | changes)

    return make


def image_task(config: RunConfig) -> ImageTask:
    task = build_task(config)
    assert isinstance(task, ImageTask)
    return task


# --- the prior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "outside", "prior"),
    [
        ([0.5, 0.5, 0, 0], 0.01, [0.495, 0.495, 0.005, 0.005]),  # a list of two classes of four
        ([1, 0, 0, 0], 0.03, [0.97, 0.01, 0.01, 0.01]),
        ([0.6, 0.3, 0, 0.1], 0.2, [0.48, 0.24, 0.2, 0.08]),  # declared, one class left out
        ([0.6, 0.2, 0.1, 0.1], 0.2, [0.6, 0.2, 0.1, 0.1]),  # nothing outside
        ([6, 2, 1, 1], 0.2, [0.6, 0.2, 0.1, 0.1]),  # counts
    ],
)
def test_the_prior_by_hand(shares: list[float], outside: float, prior: list[float]) -> None:
    found = log_prior(np.array(shares, dtype=float), outside)
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found), prior, rtol=1e-6)


@pytest.mark.parametrize(
    ("shares", "outside"), [([0.25] * 4, 0.01), ([3, 3, 3, 3], 0.5), ([1], 0.01), ([1, 1, 0, 0], 0.5)]
)
def test_a_uniform_prior_is_none(shares: list[float], outside: float) -> None:
    assert log_prior(np.array(shares, dtype=float), outside) is None


def test_smallest_shares_have_a_finite_logarithm() -> None:
    found = log_prior(np.array([1 - 1e-12, 1e-12, 0.0]), 1e-9)
    assert found is not None
    assert np.isfinite(found).all()


def test_a_list_knows_no_count_and_counts_do() -> None:
    labels, partitions = np.array([0, 0, 0, 2, 1]), [np.array([0, 1, 2, 3]), np.array([4])]
    assert held_shares(labels, partitions, 3, 0).tolist() == [0.5, 0, 0.5]
    assert held_shares(labels, partitions, 3, 1).tolist() == [0, 1, 0]
    assert record_counts(labels, partitions, 3, 0).tolist() == [3, 0, 1]


def test_each_kind_of_a_run(configure: Configure) -> None:
    assert image_task(configure("none")).client_data(0).log_prior is None
    expected = {
        ("list", ""): [0.495, 0.495, 0.005, 0.005],
        ("declared", SHARES): [0.7425, 0.2475, 0.005, 0.005],
        ("exact", ""): [0.99 * 6 / 13, 0.99 * 7 / 13, 0.005, 0.005],
    }
    for (prior, shares), own in expected.items():
        task = image_task(configure(prior, shares))
        found = task.client_data(0).log_prior
        assert found is not None
        torch.testing.assert_close(found.exp(), torch.tensor(own))
        made_up = task.made_up().log_prior
        assert made_up is not None  # what checks the rows of a run goes the same way
        assert made_up.shape == found.shape
    whole = image_task(configure("list", **{"data.partition": "iid"}))  # each client holds all classes
    assert [whole.client_data(p).log_prior for p in (0, 1)] == [None, None]
    assert whole.log_priors.tolist() == [[0.0] * 4] * 2


def test_features_are_shared_with_a_run_without_priors(configure: Configure) -> None:
    one, other = image_task(configure("none")), image_task(configure("list"))
    assert one is image_task(configure("none"))
    assert one.held_out("test") is other.held_out("test")


# --- the owners' file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("cat = 0.75", "catt = 0.75", "client-0: 'catt' is not a class; did you mean 'cat'?"),
        ("cat = 0.75", "qqqq = 0.75", "client-0: 'qqqq' is not a class; the classes are cat, dog, red bus, tree"),
        ("cat = 0.75", "cat = -0.1", "client-0: cat = -0.1; a share must be 0 or a number from 1e-12 to 1"),
        ("cat = 0.75", "cat = nan", "client-0: cat = nan; a share must be"),
        ("cat = 0.75", "cat = true", "client-0: cat = True; a share must be"),
        ("cat = 0.75", "cat = 1e-13", "client-0: cat = 1e-13; a share must be"),
        ("cat = 0.75", "cat = 0.7501", "client-0: the shares add up to 1.0001; they must add up to 1 within 1e-06"),
        ("[client-1]", "[client-2]", "'client-2' is not a client; name the tables client-0 to client-1"),
        ("[client-1]", "[client-01]", "'client-01' is not a client"),
        ("[client-0]", "client-x = 3\n[client-0]", "'client-x' is not a client"),
        ("[client-0]", "client-1 = 3\n[client-0]", "not valid TOML"),
        ("[client-1]", "[client-1", "is not valid TOML"),
        ('[client-1]\n"red bus" = 0.5\ntree = 0.5', "", "no table for client-1; with train.class-prior"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(configure: Configure, old: str, new: str, words: str) -> None:
    assert SHARES.count(old) == 1
    config = configure("declared", SHARES.replace(old, new))
    for build in (build_task, survey):
        with pytest.raises(ConfigError) as caught:
            build(config)
        assert words in str(caught.value)


def test_all_problems_of_the_file_stand_in_one_message(configure: Configure) -> None:
    wrong = SHARES.replace("cat = 0.75", "catt = 0.75").replace("tree = 0.5", "tree = 0.4") + "[client-9]\n"
    for build in (build_task, survey):
        with pytest.raises(ConfigError) as caught:
            build(configure("declared", wrong))
        _, *problems = str(caught.value).splitlines()
        assert len(problems) == 3
        assert [word in line for word, line in zip(("client-0", "client-1", "client-9"), problems, strict=True)] == [
            True
        ] * 3


def test_a_file_that_does_not_exist_is_named(configure: Configure, tmp_path: Path) -> None:
    config = configure("declared", SHARES)
    (tmp_path / "shares.toml").unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        build_task(config)


def test_a_node_needs_the_table_of_its_own_client_only(configure: Configure, tmp_path: Path) -> None:
    """With a folder for each node; the node does not join without it, and a card is the first thing it sends."""
    one_table = SHARES[: SHARES.index("[client-1]")]
    config = configure("declared", one_table, **{"data.partition": "by-node", "supernodes": 0})
    run_context = RunContext(config)
    node, other = (Node(run_context=run_context, index=i, run_folder=tmp_path, state_dir=None) for i in (0, 1))
    assert len(node.cards()) == 1
    with pytest.raises(ConfigError, match="no table for client-1"):
        other.cards()


def test_a_resumed_run_notices_other_shares(configure: Configure) -> None:
    before = image_task(configure("declared", SHARES)).data_identity
    after = image_task(configure("declared", SHARES.replace("0.75", "0.7").replace("0.25", "0.3"))).data_identity
    assert {name for name in before if before[name] != after[name]} == {"the declared class shares"}
    assert "the declared class shares" not in image_task(configure("list")).data_identity


# --- scores -----------------------------------------------------------------------------------------------------------


def by_hand(task: ImageTask, prompt: torch.Tensor, partition: int) -> list[int]:
    """Right images of each class: argmax(s·cos + log π) at home, argmax of the cosine abroad."""
    images, own = task.held_out("test"), task.log_prior(partition)
    assert own is not None
    with torch.no_grad():
        cosines = images.features @ task.text.tower.values(prompt[None])[0].T
    home = torch.isin(images.labels, task.held_classes(partition))
    right = torch.where(home, (task.logit_scale * cosines + own).argmax(dim=1), cosines.argmax(dim=1)) == images.labels
    return torch.bincount(images.labels[right], minlength=len(CLASSES)).tolist()


def ask(run_context: RunContext, folder: Path, prompt: torch.Tensor, kind: Any, new: int = 0) -> ScoreTable:
    node = Node(run_context=run_context, index=0, run_folder=folder, state_dir=None)
    clients = tuple(range(2 + new))
    request = EvaluateRequest(partitions=clients, global_prompt=prompt, server_round=1, run_token="t", prompt=kind)
    scores = node.score(request)
    assert scores.partitions == clients
    return scores.values


@pytest.mark.parametrize("method", ["dpfpl", "promptfl"])
@pytest.mark.parametrize("mechanism", ["none", "gaussian"])
def test_a_personal_prompt_is_scored_with_its_clients_prior_at_home(
    configure: Configure, tmp_path: Path, method: str, mechanism: str
) -> None:
    config = configure("declared", SHARES, **{"method": method, "privacy.record.mechanism": mechanism})
    run_context = RunContext(config)
    task, prompt = run_context.task, run_context.task.initial_prompt(config)
    assert isinstance(task, ImageTask)
    personal = [0.3 * torch.randn(prompt.shape, generator=torch.Generator().manual_seed(p)) for p in (0, 1)]
    node = Node(run_context=run_context, index=0, run_folder=tmp_path, state_dir=None)
    if run_context.keeps_state:
        for partition in (0, 1):
            state = fresh_state(prompt.shape[0], prompt.shape[1], config.prompt.rank)
            object.__setattr__(state, "personal", personal[partition])
            object.__setattr__(state, "server_round", 1)
            node.folder(partition).save(state, prompt, "t", str(run_context.terms))
    effective = [prompt + p if method == "dpfpl" else prompt for p in personal]
    found = ask(run_context, tmp_path, prompt, "personal")
    assert found.correct.tolist() == [by_hand(task, own, p) for p, own in enumerate(effective)]
    assert found.total.tolist() == [5] * len(CLASSES)
    # The shared prompt is asked about with the same prior, and the un-tuned model without one.
    shared = ask(run_context, tmp_path, prompt, "global")
    assert shared.correct.tolist() == [by_hand(task, prompt, p) for p in (0, 1)]
    (plain, _) = task.counts(prompt[None], config)[0]
    assert shared.correct.tolist() != [plain.tolist()] * 2
    assert shared.neighbour() == ScoreTable.of(plain, torch.from_numpy(found.total), run_context.held).neighbour()
    untuned = ask(run_context, tmp_path, prompt, "zero-shot")
    assert untuned.correct.tolist() == [task.zero_shot_counts(config)[0].tolist()] * 2


@pytest.mark.parametrize("prior", ["list", "declared"])
def test_a_new_client_is_scored_with_its_own_prior(configure: Configure, tmp_path: Path, prior: str) -> None:
    """With p_G. In this division the trained clients hold all classes, and the new one three of the four."""
    shares = SHARES + '[client-2]\ncat = 0.2\ndog = 0.2\n"red bus" = 0.5\ntree = 0.1\n'
    divided = {"data.partition": "dirichlet", "data.dirichlet-alpha": 0.1, "seed": 21}
    config = configure(prior, shares, **divided, **{"evaluation.new-clients": 1})
    run_context = RunContext(config)
    task, prompt = run_context.task, run_context.task.initial_prompt(config)
    assert isinstance(task, ImageTask)
    assert task.held_classes(2).tolist() == [0, 1, 2]
    found = ask(run_context, tmp_path, prompt, "global", new=1)
    assert found.correct.tolist()[2] == by_hand(task, prompt, 2)
    assert found.local()[2] is not None


def test_a_new_client_needs_declared_shares_too(configure: Configure) -> None:
    with pytest.raises(ConfigError, match="no table for client-2; with "):
        build_task(configure("declared", SHARES, **{"data.partition": "iid", "evaluation.new-clients": 1}))


def test_a_client_of_a_domain_lists_classes(configure: Configure, tmp_path: Path) -> None:
    """The prior is one of classes: those of its domain, at home in its domain only."""
    root, rng = tmp_path / "domains", np.random.default_rng(1)
    for domain, names in {"attic": CLASSES[:2], "cellar": CLASSES}.items():
        for split, count in {"train": 6, "val": 1, "test": 4}.items():
            for name in names:
                (root / split / domain / name).mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / domain / name / f"{i}.png")
    changes = {"data.path": str(root), "data.partition": "by-domain", "method": "promptfl"}
    config = configure("list", **changes, **{"privacy.record.mechanism": "none"})
    run_context = RunContext(config)
    task, prompt = run_context.task, run_context.task.initial_prompt(config)
    assert isinstance(task, ImageTask)
    own, uniform = task.log_prior(0), task.log_prior(1)
    assert uniform is None
    assert own is not None
    torch.testing.assert_close(own.exp(), torch.tensor([0.495, 0.495, 0.005, 0.005]))
    images = task.held_out("test")
    with torch.no_grad():
        logits = task.logit_scale * images.features @ task.text.tower.values(prompt[None])[0].T
    plain, adjusted = (answers.argmax(dim=1) == images.labels for answers in (logits, logits + own))
    groups = torch.from_numpy(task._groups("test"))
    assert sorted(set(groups.tolist())) == [0, 1, 4, 5, 6, 7]  # the first domain lacks two classes
    expected = [
        torch.bincount(groups[right], minlength=8).tolist()
        for right in (torch.where(groups < 4, adjusted, plain), plain)
    ]
    assert ask(run_context, tmp_path, prompt, "global").correct.tolist() == expected
    assert expected[0] != expected[1]


def test_without_a_prior_scores_are_the_counts(configure: Configure, tmp_path: Path) -> None:
    config = configure("none")
    task, run_context = image_task(config), RunContext(config)
    prompt = task.initial_prompt(config)
    assert task.prior_counts(prompt[None], [0, 1], torch.ones(2, 4).bool(), config) is None
    found = ask(run_context, tmp_path, prompt, "global")
    assert found.correct.tolist() == [task.counts(prompt[None], config)[0][0].tolist()] * 2


@pytest.mark.parametrize("method", ["linear-probe", "fedotp", "dp-lora"])
def test_every_learner_scores_with_the_logits_of_its_loss(configure: Configure, method: str) -> None:
    """A prior as strong as the logits decides only if they have the scale that they have in the loss."""
    config = configure("declared", SHARES, method=method)
    task = image_task(config)
    run_context = RunContext(config)
    prompt = run_context.method.effective(task.initial_prompt(config), torch.zeros(run_context.prompt_shape))
    images, own = task.held_out("test"), task.log_prior(0)
    assert own is not None
    if method == "fedotp":
        (logits,) = task.learner(config).objective.logits(prompt[None], images)  # type: ignore[attr-defined]
    elif method == "linear-probe":
        logits = task.logit_scale * (images.features @ prompt[:, :-1].T + prompt[:, -1])
    else:
        context = task.context_of(prompt, config)
        assert context is not None
        logits = task.logit_scale * images.features @ task.text.tower.values(context[None])[0].T
    with torch.no_grad():
        correct, total = count_logits(logits + own, images.labels, images.labels, 4)
    counts = task.prior_counts(prompt[None], [0], run_context.held[:1], config)
    assert counts is not None
    assert counts[0][0, :2].tolist() == correct[:2].tolist()
    assert counts[1].tolist() == total.tolist()


@pytest.mark.parametrize("prior", ["list", "declared"])
def test_the_free_rival_knows_declared_shares_and_asks_no_validation_image_about_a_list(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, prior: str
) -> None:
    """No prior of a list gains more than the list, so only declared shares give a choice."""
    config = configure(prior, SHARES)
    task, seen = image_task(config), list[str]()
    held_out = ImageTask.held_out
    monkeypatch.setattr(ImageTask, "held_out", lambda self, split: (seen.append(split), held_out(self, split))[1])
    form = task._free_form(config)
    assert ("val" in seen) == (prior == "declared")
    assert form.name in ("un-tuned, own class list", "un-tuned, own class prior")
    correct, total = task.free_counts(config)
    assert correct.shape == (2, 4)
    assert total.tolist() == [5] * 4
    # In units of the cosines.
    assert (form.log_prior is None) == (prior == "none")
    assert form.log_prior is not None
    torch.testing.assert_close(form.log_prior[0] * task.logit_scale, task.log_prior(0))
