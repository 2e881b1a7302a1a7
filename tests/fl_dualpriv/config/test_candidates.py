"""The key ``prompt.candidates``: a list, a file or a published set, and the rules of the starts that read it."""

from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.cli.job import prepare
from fl_dualpriv.config.candidates import are_candidates, read_candidates, split_candidates
from fl_dualpriv.config.schema import RunConfig, app_defaults, parse_assignment, read_toml
from fl_dualpriv.errors import ConfigError

ROOT = Path(__file__).parents[3]
DEFAULTS = app_defaults(ROOT)
TWO = "a photo of a {} | a drawing of a {}"


def problems(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as found:
        RunConfig.from_run_config(DEFAULTS | changes)
    return str(found.value)


def test_a_list_has_bars_or_lines() -> None:
    assert split_candidates(TWO) == ("a photo of a {}", "a drawing of a {}")
    assert split_candidates("a {}\n\n b {} \n") == ("a {}", "b {}")
    assert split_candidates("a|b {}") == ("a|b {}",)


@pytest.mark.parametrize("value", ["", TWO, "/a/file", "clip-imagenet-80", "clip-imagenet-7"])
def test_allowed_values(value: str) -> None:
    assert are_candidates(value)


@pytest.mark.parametrize("value", ["clip-imagenet-81", "a photo", "a {} of a {}", "a {} | a {}", "a {x} {}", " | "])
def test_refused_values_name_the_key(value: str) -> None:
    assert "prompt.candidates = " in problems({"prompt.candidates": value})


def test_a_toml_list_becomes_one_string(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[prompt]\ncandidates = ["a photo of a {}", "a {}"]\n', encoding="utf-8")
    assert read_toml(file) == {"prompt.candidates": "a photo of a {}\na {}"}
    file.write_text('[prompt]\ncandidates = ["a {}", 3]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="a list is not a config value"):
        read_toml(file)
    file.write_text('[prompt]\nwords = ["a {}"]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="a list is not a config value"):
        read_toml(file)
    assert parse_assignment('prompt.candidates=["a {}", "b {}"]') == ("prompt.candidates", "a {}\nb {}")


def test_a_file_has_one_template_a_line(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\n\na drawing of a {}\n", encoding="utf-8")
    assert read_candidates(str(file)) == ("a photo of a {}.", "a drawing of a {}")
    assert read_candidates("clip-imagenet-7") is None
    file.write_text("a photo\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="each line must be a different template"):
        read_candidates(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_candidates(str(tmp_path / "absent"))


def test_the_front_puts_a_file_s_templates_into_the_configuration(tmp_path: Path) -> None:
    file, config = tmp_path / "templates.txt", tmp_path / "a.toml"
    file.write_text("a photo of a {}\na {}\n", encoding="utf-8")
    config.write_text(f'[prompt]\ninit = "mean"\ncandidates = "{file}"\n', encoding="utf-8")
    job = prepare(config, [], tmp_path / "out", ROOT, overwrite=False)
    assert job.config.prompt.candidates == job.flat["prompt.candidates"] == "a photo of a {}\na {}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt.init": "mean"}, "needs prompt.candidates"),
        ({"prompt.init": "select"}, "needs prompt.candidates"),
        ({"prompt.init": "mean", "method": "prototypes"}, "must be of a context of words"),
        ({"prompt.init": "mean", "method": "promptfl", "prompt.learner": "head"}, "must be of a context of words"),
        ({"data.ref": "demo-vqa", "backbone.name": "demo-vqa", "method": "promptfl"}, "must be empty for questions"),
        ({"prompt.init": "select", "method": "fedotp"}, 'must not be "select" for this method'),
        ({"prompt.init": "select", "method": "dpfpl-paper"}, 'must not be "select" for this method'),
        ({"prompt.init": "select", "prompt.select": "client", "method": "promptfl"}, 'must be "federated"'),
        ({"prompt.init": "select", "prompt.select": "client", "method": "lowrank"}, 'must be "federated"'),
        ({"prompt.init": "select", "privacy.client.mechanism": "gaussian"}, "with client-level privacy"),
        (
            {"prompt.init": "select", "privacy.record.trusts-server": True, "train.local-steps": 1},
            "when the server adds the noise",
        ),
        ({"privacy.record.selection-share": 1.0}, "must be from 0.001 to 0.999"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], words: str) -> None:
    given = changes if words == "needs prompt.candidates" else {"prompt.candidates": TWO} | changes
    assert words in problems(given)
