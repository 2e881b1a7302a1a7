"""The owner's file says all that is wrong with it, and nothing in it has a default that its owner did not choose."""

from pathlib import Path

import pytest
from PIL import Image

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.node.data import look_at
from fl_dualpriv.node.file import ENVIRONMENT, NodeFile, find_node_file, read_node_file
from fl_dualpriv.privacy.filters.budget import Budget

WHOLE = f"""
state-dir = "/var/lib/fl-dualpriv"
data-path = "/srv/images"
[budget]
epsilon = 8
delta = 1e-5
max-sampling-rate = 0.2
min-noise-multiplier = 0.5
max-clip-norm = 1.0
scores = true
[app]
allowed = ["{"0a" * 32}"]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    assert read_node_file(write(tmp_path, WHOLE)) == NodeFile(
        state_dir=Path("/var/lib/fl-dualpriv"),
        data_path=Path("/srv/images"),
        budget=Budget(
            epsilon=8.0,
            delta=1e-5,
            max_sampling_rate=0.2,
            min_noise_multiplier=0.5,
            max_clip_norm=1.0,
            trusts_server=False,
            scores=True,
            seeded_noise=False,
        ),
        apps=("0a" * 32,),
    )


def test_an_empty_file_sets_no_limits(tmp_path: Path) -> None:
    assert read_node_file(write(tmp_path, "")) == NodeFile(state_dir=None, data_path=None, budget=None, apps=())


def test_permissions_default_to_no(tmp_path: Path) -> None:
    budget = read_node_file(write(tmp_path, WHOLE.replace("scores = true", ""))).budget
    assert budget is not None
    assert (budget.scores, budget.trusts_server, budget.seeded_noise) == (False, False, False)
    assert not budget.integer_arithmetic  # a demand: without it a run chooses


def test_an_owner_can_demand_integer_arithmetic(tmp_path: Path) -> None:
    budget = read_node_file(write(tmp_path, WHOLE.replace("scores = true", "integer-arithmetic = true"))).budget
    assert budget is not None
    assert budget.integer_arithmetic


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epsilon = 8", "", "budget.epsilon is missing"),
        ("epsilon = 8", "epsilon = -1", "budget.epsilon = -1; it must be from 1e-06 to 1e+06"),
        ("epsilon = 8", "epsilon = inf", "budget.epsilon = inf"),
        ("epsilon = 8", "epsilon = true", "budget.epsilon = True"),
        ("delta = 1e-5", "delta = 1", "budget.delta = 1; it must be at least 1e-12 and less than 1"),
        ("max-sampling-rate = 0.2", "max-sampling-rate = 0", "budget.max-sampling-rate = 0"),
        ("min-noise-multiplier = 0.5", "min-noise-multiplier = nan", "budget.min-noise-multiplier = nan"),
        ("max-clip-norm = 1.0", "max-clip-norm = 1.33e-322", "budget.max-clip-norm = 1.33e-322; it must be from 1e-30"),
        ("scores = true", "integer-arithmetic = 1", "budget.integer-arithmetic = 1; it must be true or false"),
        ("scores = true", "scores = 1", "budget.scores = 1; it must be true or false"),
        ("scores = true", "score = true", "unknown key budget.score"),
        ('state-dir = "/var/lib/fl-dualpriv"', 'state-dir = "mine"', "state-dir = 'mine'; give an absolute path"),
        ('state-dir = "/var/lib/fl-dualpriv"', 'statedir = "/x"', "unknown key statedir"),
        ('data-path = "/srv/images"', "data-path = 3", "data-path = 3; give an absolute path"),
        ("0a", "0A", "has 64 digits"),
        ("allowed =", "allow =", "unknown key app.allow"),
        ("[budget]", "[budget", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_node_file(write(tmp_path, WHOLE.replace(old, new)))
    assert words in str(error.value)


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)budget.epsilon is missing.*budget.delta = 2"):
        read_node_file(write(tmp_path, WHOLE.replace("epsilon = 8", "").replace("1e-5", "2")))


def test_the_nodes_own_word_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert find_node_file(None) is None
    monkeypatch.setenv(ENVIRONMENT, str(write(tmp_path, WHOLE)))
    found = find_node_file(None)
    assert found is not None
    assert found.apps
    named = tmp_path / "other.toml"
    named.write_text("")
    assert find_node_file(str(named)) == NodeFile(state_dir=None, data_path=None, budget=None, apps=())


def test_a_nodes_budget_needs_a_folder_that_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, WHOLE.replace('state-dir = "/var/lib/fl-dualpriv"', ""))
    with pytest.raises(ConfigError, match="but no state-dir"):
        find_node_file(str(path))
    unnamed = write(tmp_path, WHOLE.replace('data-path = "/srv/images"', ""))
    with pytest.raises(ConfigError, match="but no data-path"):
        find_node_file(str(unnamed))
    path = write(tmp_path, WHOLE.replace('state-dir = "/var/lib/fl-dualpriv"', ""))
    monkeypatch.setenv(ENVIRONMENT, str(path))  # a simulation: every run's clients are new
    found = find_node_file(None)
    assert found is not None
    assert found.budget is not None


def test_the_owners_data_come_with_the_owners_files_about_them(tmp_path: Path) -> None:
    """No run names a file of this disk: where the owner gives no class shares, there are none."""
    plain = read_node_file(write(tmp_path, WHOLE)).overrides()
    assert (plain["data.classes"], plain["data.class-shares"]) == ("", "")
    with_files = 'classes = "/srv/classes.json"\nclass-shares = "/srv/shares.toml"\n' + WHOLE
    keys = read_node_file(write(tmp_path, with_files)).overrides()
    assert (keys["data.classes"], keys["data.class-shares"]) == ("/srv/classes.json", "/srv/shares.toml")
    with pytest.raises(ConfigError, match=r"class-shares = 'shares.toml'; give an absolute path"):
        read_node_file(write(tmp_path, 'class-shares = "shares.toml"'))


@pytest.mark.parametrize("path", ["node.toml", "/does/not/exist.toml"])
def test_a_file_that_cannot_be_used_stops_everything(path: str) -> None:
    with pytest.raises(ConfigError, match="node file"):
        find_node_file(path)


def test_a_server_names_no_column_of_the_owners_data(tmp_path: Path) -> None:
    roles = ("image", "label", "domain", "client")
    keys = read_node_file(write(tmp_path, WHOLE)).overrides()
    assert {role: keys[f"data.{role}-column"] for role in roles} == dict.fromkeys(roles, "")
    keys = read_node_file(write(tmp_path, 'columns = {label = "species"}\n' + WHOLE)).overrides()
    assert keys["data.label-column"] == "species"
    assert keys["data.image-column"] == ""


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ('{ward = "x"}', "unknown key columns.ward; allowed are image and label"),
        ("{label = 3}", "it must be a table of names"),
        ('"label"', "it must be a table of names"),
    ],
)
def test_columns_of_another_form_are_refused(columns: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read_node_file(write(tmp_path, f"columns = {columns}\n" + WHOLE))


def test_a_list_joins_only_with_declared_classes(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{('cat', 'dog')[i % 2]}" for i in range(12)]
    (tmp_path / "list.csv").write_text("\n".join(["photo,species", *rows]))
    (tmp_path / "classes.json").write_text('{"class-names": {"cat": "cat", "dog": "dog", "owl": "owl"}}')
    columns = {"image": "photo", "label": "species"}
    with pytest.raises(ConfigError, match="the classes are not declared, and on a node they must not depend on"):
        look_at(tmp_path / "list.csv", None, columns)
    with pytest.raises(ConfigError, match="has the columns photo, species"):
        look_at(tmp_path / "list.csv", tmp_path / "classes.json", {})
    data = look_at(tmp_path / "list.csv", tmp_path / "classes.json", columns)
    assert data.says.startswith("8 training images of 3 classes")
    assert data.found.are_all
