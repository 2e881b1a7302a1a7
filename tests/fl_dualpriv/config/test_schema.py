import dataclasses
import math
from pathlib import Path

import pytest

from fl_dualpriv.config.class_prior_rules import default_prior
from fl_dualpriv.config.schema import RunConfig, app_defaults, flatten, merge, parse_assignment, read_toml
from fl_dualpriv.errors import ConfigError

APP_DIR = Path(__file__).parents[3]
DEFAULTS = app_defaults(APP_DIR)
OWN = {key: value for key, value in DEFAULTS.items() if not key.startswith("plugin.")}
FLOAT_KEYS = [key for key, value in OWN.items() if isinstance(value, float)]
OTHER_COUNTS = (
    *("seed", "supernodes", "train.top-m", "resources.workspace-mib"),
    *("pruning.visual-layer", "pruning.visual-fused", "data.max-tokens", "privacy.client.bands"),
    "evaluation.new-clients",
)
COUNT_KEYS = [key for key, value in OWN.items() if type(value) is int and key not in OTHER_COUNTS]


def problem_lines(overrides: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_run_config(merge(DEFAULTS, overrides))
    header, *lines = str(caught.value).splitlines()
    assert header.startswith("the run configuration has ")
    return [line.strip() for line in lines]


def test_defaults_round_trip():
    config = RunConfig.from_run_config(DEFAULTS)
    assert config.to_run_config() == OWN | {"train.class-prior": "list"}  # classes are divided among the clients
    assert RunConfig.from_run_config(config.to_run_config()) == config


def test_auto_is_a_folder_if_there_is_a_path():
    assert RunConfig.from_run_config(DEFAULTS).data.source == "demo"
    assert RunConfig.from_run_config(merge(DEFAULTS, {"data.path": "/images"})).data.source == "folder"
    named = merge(DEFAULTS, {"data.ref": "folder", "data.path": "/images"})
    assert RunConfig.from_run_config(named).data.source == "folder"


def test_types_and_nesting():
    config = RunConfig.from_run_config(merge(DEFAULTS, {"train.sampling-rate": 1, "privacy.client.clip-norm": 3}))
    assert config.train.sampling_rate == 1.0
    assert type(config.train.sampling_rate) is float
    assert config.privacy.client.clip_norm == 3.0
    assert config.privacy.record.clip_norm == DEFAULTS["privacy.record.clip-norm"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rounds = 3  # pyright: ignore


def test_plugin_keys_are_left_to_others():
    flat = merge(DEFAULTS, {"plugin.fedavgm.momentum": 0.9})
    assert RunConfig.from_run_config(flat) == RunConfig.from_run_config(DEFAULTS)


def test_all_problems_at_once():
    broken = {
        "rounds": "two",
        "train.sampling-rate": 1.5,
        "privacy.client.clip_norm": 1.0,
        "data.partition": "random",
        "prompt.rank": 5,  # n-ctx is 4
        "train.local-steps": 0,
        "privacy.record.trusts-server": True,  # its local-steps rule is skipped: that key has a problem of its own
    }
    flat = merge(DEFAULTS, broken)
    del flat["output.dir"]
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_run_config(flat)
    header, *lines = str(caught.value).splitlines()
    assert header == "the run configuration has 7 problems:"
    starts = {line.split(" =")[0].split(" is")[0].strip() for line in lines}
    assert starts == (broken.keys() - {"privacy.record.trusts-server"}) | {"output.dir"}


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("sead", "did you mean seed?"),
        ("join_timeout", "did you mean join-timeout?"),
        ("privacy.record.noise_multiplier", "did you mean privacy.record.noise-multiplier?"),
        ("train.rank", "did you mean prompt.rank?"),
        ("epsilon", "did you mean privacy.record.epsilon or privacy.client.epsilon?"),
        ("output", "this is a section; set one of its keys: output.dir"),
        ("qqqqqq", "see pyproject.toml"),
    ],
)
def test_unknown_key(key, guess):
    (line,) = problem_lines({key: 1})
    assert line.startswith(f"{key} = 1:")
    assert guess in line


def test_missing_key():
    flat = dict(DEFAULTS)
    del flat["train.top-m"]
    with pytest.raises(ConfigError, match=r"1 problem:\n  train.top-m is missing: add it, a whole number"):
        RunConfig.from_run_config(flat)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rounds", True, "rounds = true: must be a whole number"),
        ("rounds", 3.0, "rounds = 3.0: must be a whole number"),
        ("rounds", "3", 'rounds = "3": must be a whole number'),
        ("train.sampling-rate", False, "train.sampling-rate = false: must be a number"),
        ("privacy.record.trusts-server", 1, "privacy.record.trusts-server = 1: must be true or false"),
        ("data.path", 7, "data.path = 7: must be a string"),
        ("data.path", [1], "data.path = [1]: must be a string"),
        ("method", "dp_fpl", 'did you mean "dpfpl"?'),
        ("method", 3, "must be one of dpfpl, promptfl, local-only, lowrank, full, zero-shot, dpfpl-paper"),
        ("privacy.randomness", "", "must be one of os, seeded"),
        ("train.local-learning-rate", 10**400, "must be a finite number"),
    ],
)
def test_wrong_type_or_choice(key, value, expected):
    (line,) = problem_lines({key: value})
    assert expected in line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("key", FLOAT_KEYS)
def test_no_float_may_be_nan_or_infinite(key, value):
    (line,) = problem_lines({key: value})
    assert line.startswith(f"{key} = {value}: must be a finite number")


@pytest.mark.parametrize("key", COUNT_KEYS)
def test_counts_start_at_one(key):
    (line,) = problem_lines({key: 0})
    assert line.startswith(f"{key} = 0: must be a whole number from 1 to ")


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("seed", -1, 0),
        ("seed", 2**63, 2**63 - 1),
        ("join-timeout", 0.0, 0.1),
        ("reply-timeout", -1.0, 1),
        ("train.sampling-rate", 0.0, 1.0),
        ("train.sampling-rate", 1.0001, 1e-9),
        ("train.global-learning-rate", -0.1, 0.0),
        ("train.local-learning-rate", -0.1, 0),
        ("pruning.visual-keep-ratio", 0, 1),
        ("pruning.update-keep-ratio", 1.01, 0.01),
        ("privacy.record.epsilon", 0.0, 1e-3),
        ("privacy.client.epsilon", -1, 100),
        ("privacy.record.noise-multiplier", 0.0, 0.3),
        ("privacy.client.noise-multiplier", -2.0, 7),
        ("privacy.record.delta", 0.0, 1e-12),
        ("privacy.client.delta", 1.0, 0.999),
        ("privacy.record.clip-norm", 0, 10),
        ("privacy.client.clip-norm", -1.0, 1e-6),
        ("privacy.client.expected-cohort", 0.0, 0.5),
        ("privacy.client.bands", -1, 0),
        ("privacy.client.target-quantile", 1.0, 0.9),
        ("privacy.client.clip-learning-rate", 0, 0.2),
        ("privacy.client.bit-noise-share", -0.05, 0.5),
        ("data.dirichlet-alpha", 0.0, 0.05),
        ("data.val-fraction", 0.0, 0.79),
        ("data.test-fraction", 0.0, 0.89),
        ("strategy.ref", "strategies.dpfpl", "mine:Mine"),
        ("strategy.ref", "strategies/dpfpl:DPFPL", "a.b.c:D_1"),
        ("strategy.ref", "strategies.dpfpl:", "_a:b"),
        ("backbone.name", "", "ViT-B-16"),
        ("backbone.name", "local-dir:", "local-dir:/models/x"),
        ("resources.device", "gpu", "cpu"),
        ("resources.device", "cuda:", "cuda"),
        ("resources.device", "cuda:x", "cuda:12"),
        ("resources.gpus-per-client", -0.1, 0.25),
        ("resources.workspace-mib", 15, 16),
        ("resources.feature-cache", "features", "/features"),
        ("resources.feature-cache", "none", "off"),
        ("supernodes", -1, 0),
        ("train.top-m", -1, 3),
        ("train.top-m", 1, 2),
        ("output.dir", "runs/a", "/runs/a"),
    ],
)
def test_ranges(key, bad, good):
    (line,) = problem_lines({key: bad})
    assert line.startswith(f"{key} = ")
    assert "must be" in line
    assert "; " in line
    config = RunConfig.from_run_config(merge(DEFAULTS, {key: good}))
    assert config.to_run_config()[key] == good


TRUSTS = {"privacy.record.trusts-server": True, "train.local-steps": 1}
CLIENT = {"privacy.client.mechanism": "gaussian"}
TREE = {"privacy.client.mechanism": "tree"}
FEATURE = {"privacy.record.noise-space": "feature"}
PRUNED = {"pruning.update-keep-ratio": 0.5}
COMPONENT = {"pruning.update-block": "component"}
MATRIX = {"pruning.update-block": "matrix"}
LORA = {
    "prompt.learner": "lora",
    "prompt.rank": 8,  # more than prompt.n-ctx, which is not read
    "method": "promptfl",
    "data.ref": "questions",
    "data.path": "/questions.jsonl",
    "backbone.name": "hf:/llava",
}


@pytest.mark.parametrize(
    ("overrides", "blamed", "reason"),
    [
        ({"prompt.n-ctx": 1}, "prompt.rank", "must be at most prompt.n-ctx (here prompt.n-ctx = 1"),
        ({"supernodes": 11}, "supernodes", "must be at most population (here population = 10)"),
        ({"prompt.learner": "head"}, "prompt.learner", 'must be "context" for this method'),
        ({"train.top-m": 3, "privacy.record.mechanism": "none"}, "train.top-m", "needs privacy.record.mechanism"),
        ({"train.top-m": 3, "method": "dpfpl-paper"}, "train.top-m", "must be 0, as in the DP-FPL paper"),
        (
            {"dpfpl-paper.published": "code", "method": "dpfpl-paper", "train.local-steps": 2},
            "dpfpl-paper.published",
            "needs train.local-steps = 1",
        ),
        ({**FEATURE, "train.top-m": 3}, "privacy.record.noise-space", "so top-m must be 0"),
        (
            {**FEATURE, "method": "dpfpl-paper"},
            "privacy.record.noise-space",
            'must be "prompt", as in the DP-FPL paper',
        ),
        ({**FEATURE, **TRUSTS}, "privacy.record.noise-space", "when the server adds the noise"),
        ({"data.ref": "folder"}, "data.path", "must be the directory of the images"),
        ({"data.ref": "folder", "data.path": "  "}, "data.path", "must be the directory of the images"),
        ({"data.ref": "demo", "data.path": "/images"}, "data.path", 'did you mean data.ref = "folder"'),
        ({"data.classes": "/names.json"}, "data.classes", 'did you mean data.ref = "folder"'),
        ({"data.val-fraction": 0.5, "data.test-fraction": 0.5}, "data.test-fraction", "must be less than 1 together"),
        ({**CLIENT, "population": 9}, "privacy.client.expected-cohort", "at most population"),  # 10.0 expected
        ({**CLIENT, "method": "local-only"}, "privacy.client.mechanism", "shares no prompt"),
        ({**CLIENT, "method": "zero-shot"}, "privacy.client.mechanism", "shares no prompt"),
        ({**TRUSTS, "train.local-steps": 2}, "privacy.record.trusts-server", "needs train.local-steps = 1"),
        ({**TRUSTS, "privacy.record.mechanism": "none"}, "privacy.record.trusts-server", "needs privacy.record.mech"),
        ({**TRUSTS, **CLIENT}, "privacy.record.trusts-server", "needs privacy.client.mechanism"),
        ({**TRUSTS, "method": "local-only"}, "privacy.record.trusts-server", "needs a method that shares a prompt"),
        ({**TRUSTS, "method": "zero-shot"}, "privacy.record.trusts-server", "needs a method that shares a prompt"),
        ({**CLIENT, "method": "dpfpl-paper"}, "method", "needs privacy.client.mechanism"),
        ({**TRUSTS, "method": "dpfpl-paper"}, "method", "needs privacy.record.trusts-server = false"),
        ({"privacy.client.clipping": "adaptive"}, "privacy.client.clipping", "there is none to scale"),
        ({**TREE, "privacy.client.clipping": "adaptive"}, "privacy.client.clipping", "or it spans all rounds"),
        ({**TREE, "privacy.client.bands": 2}, "privacy.client.bands", "applies only to mechanism"),
        ({**TREE, "privacy.arithmetic": "integer"}, "privacy.arithmetic", 'must be "float" for correlated noise'),
        ({"pruning.update-keep-ratio": 0.5, "method": "dpfpl-paper"}, "method", "needs pruning.update-keep-ratio = 1"),
        ({**PRUNED, **FEATURE, "pruning.update-rule": "past"}, "pruning.update-rule", 'noise-space must be "prompt"'),
        ({**PRUNED, **FEATURE, "pruning.update-rule": "shrink"}, "pruning.update-rule", 'noise-space must be "prompt"'),
        ({**FEATURE, "train.optimizer": "adam-corrected"}, "train.optimizer", 'noise-space must be "prompt"'),
        (
            {**PRUNED, **TRUSTS, "method": "promptfl", "pruning.update-rule": "past"},
            "pruning.update-rule",
            "never has one",
        ),
        ({**PRUNED, **COMPONENT, "pruning.update-rule": "past"}, "pruning.update-block", "masks before the clip"),
        ({**PRUNED, **COMPONENT, "method": "full"}, "pruning.update-block", "needs a method with low-rank factors"),
        (
            {**PRUNED, **COMPONENT, "pruning.update-frozen": True, "train.optimizer": "momentum"},
            "pruning.update-block",
            "cannot be frozen under an optimizer",
        ),
        ({**LORA, "method": "dpfpl"}, "prompt.learner", 'must be "context" for this method'),
        ({"prompt.learner": "lora", "method": "full"}, "prompt.learner", "it adapts a language model"),
        ({**PRUNED, **MATRIX}, "pruning.update-block", "needs a prompt that is made of matrices"),
        (
            {**PRUNED, "pruning.update-block": "coordinate", "pruning.update-rule": "shrink"},
            "pruning.update-block",
            "blocks of three or more",
        ),
    ],
)
def test_cross_rules(overrides, blamed, reason):
    (line,) = problem_lines(overrides)
    assert line.startswith(f"{blamed} = ")
    assert reason in line


@pytest.mark.parametrize(
    "overrides",
    [
        TRUSTS,
        {**TRUSTS, "method": "promptfl"},
        {**CLIENT, "population": 100, "method": "full"},
        {"supernodes": 10},
        {"prompt.learner": "head", "method": "promptfl"},
        LORA,
        {**LORA, **PRUNED, **MATRIX, "method": "full", "pruning.update-rule": "past"},
        {**LORA, "method": "zero-shot", "rounds": 1},
        MATRIX,  # update-keep-ratio = 1: no block is cut
        {"train.top-m": 3},
        FEATURE,
        {"population": 1},  # expected-cohort = 10 is not read while the mechanism is none
        {"method": "dpfpl-paper"},
        {"method": "local-only"},
        {"method": "zero-shot", "rounds": 1},
        {"data.ref": "folder", "data.path": "/images", "data.classes": "/names.json"},
        {**FEATURE, "pruning.update-rule": "past"},  # update-keep-ratio = 1: no rule is read
        {**PRUNED, **TRUSTS, "pruning.update-rule": "past"},
        {**PRUNED, **COMPONENT, "train.optimizer": "adam", "pruning.update-frozen": False},
    ],
    ids=str,
)
def test_accepted_combinations(overrides):
    flat = merge(DEFAULTS, overrides)
    config = RunConfig.from_run_config(flat)
    prior = default_prior(config.method, config.data.ref, config.data.partition)
    assert config.to_run_config() == merge(OWN, overrides) | {"train.class-prior": prior}


@pytest.mark.parametrize(
    ("changes", "prior"),
    [
        ({}, "list"),
        ({"data.partition": "dirichlet"}, "none"),
        ({"data.partition": "iid"}, "none"),
        ({"method": "zero-shot"}, "none"),
        ({"method": "prototypes"}, "none"),
        ({"train.class-prior": "none"}, "none"),
    ],
)
def test_the_prior_is_a_list_where_the_division_makes_lists(changes, prior):
    config = RunConfig.from_run_config(merge(DEFAULTS, changes))
    assert config.train.class_prior == prior
    assert dataclasses.replace(config, seed=7).train.class_prior == prior


@pytest.mark.parametrize(("supernodes", "nodes"), [(0, 10), (3, 3), (10, 10)])
def test_without_a_number_every_client_has_a_node_of_its_own(supernodes, nodes):
    assert RunConfig.from_run_config(merge(DEFAULTS, {"supernodes": supernodes})).num_supernodes == nodes


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    flat = merge(DEFAULTS, {"data.ref": "folder", "data.path": "~/images", "output.dir": "~/runs"})
    config = RunConfig.from_run_config(flat)
    assert (config.data.path, config.output.dir) == ("/home/someone/images", "/home/someone/runs")
    assert RunConfig.from_run_config(config.to_run_config()) == config


def test_unknown_home_is_one_more_problem():
    (line,) = problem_lines({"output.dir": "~no-such-user-here/runs"})
    assert line.startswith('output.dir = "~no-such-user-here/runs": must be empty or an absolute path')


def test_direct_construction_is_checked_too():
    config = RunConfig.from_run_config(DEFAULTS)
    with pytest.raises(ConfigError, match="population = 0"):
        dataclasses.replace(config, population=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds=3", ("rounds", 3)),
        (" train.local-steps = 1 ", ("train.local-steps", 1)),
        ("a=1e-4", ("a", 1e-4)),
        ("a=true", ("a", True)),
        ("a=True", ("a", "True")),
        ("a=dpfpl", ("a", "dpfpl")),
        ("a='x y'", ("a", "x y")),
        ("a=x y", ("a", "x y")),
        ("a=/data/my images", ("a", "/data/my images")),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
        ("a=2026-01-01", ("a", "2026-01-01")),
        ("a=1\nb=2", ("a", "1\nb=2")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parse_assignment(text, expected):
    key, value = parse_assignment(text)
    assert (key, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["rounds", "=3", "", "a=[1, 2]", "a={b = 1}"])
def test_parse_assignment_refuses(text):
    with pytest.raises(ConfigError):
        parse_assignment(text)


def test_flatten_keeps_spelling_and_refuses_arrays():
    assert flatten({"a": 1, "b": {"c_d": {"e-f": "x"}, "g": False}}) == {"a": 1, "b.c_d.e-f": "x", "b.g": False}
    with pytest.raises(ConfigError, match=r"b\.c = \[1\]: a list is not a config value"):
        flatten({"b": {"c": [1]}})


def test_merge_later_wins_and_keeps_unknown_keys():
    first = {"a": 1, "b": 2}
    assert merge(first, {"b": 3, "zz": 4}, {"zz": 5}) == {"a": 1, "b": 3, "zz": 5}
    assert first == {"a": 1, "b": 2}


def test_read_toml(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('rounds = 2\n[privacy.record]\nmechanism = "none"\n', encoding="utf-8")
    assert read_toml(file) == {"rounds": 2, "privacy.record.mechanism": "none"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "does not exist"), (b"rounds = ", "is not valid TOML"), (b"a = '\xff'", "is not valid TOML")],
    ids=["missing", "syntax", "encoding"],
)
def test_unusable_toml(tmp_path, content, reason):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_toml(file)


def test_directory_is_no_toml(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


@pytest.mark.parametrize("content", ["", "[tool]\nflwr = 3\n"], ids=["empty", "no table"])
def test_app_without_config(tmp_path, content):
    (tmp_path / "pyproject.toml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has no \[tool.flwr.app.config\] table"):
        app_defaults(tmp_path)


def test_an_old_value_is_refused_with_its_new_name():
    with pytest.raises(ConfigError, match=r'fedotp.patch-reading = "alone": has a new name; write "isolated"'):
        RunConfig.from_run_config(app_defaults(APP_DIR) | {"fedotp.patch-reading": "alone"})
