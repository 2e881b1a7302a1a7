"""A sweep file: what its cells are, and that every mistake is told, all at once and before any run."""

import math
from pathlib import Path

import pytest

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.sweep.cells import cells_of
from fl_dualpriv.sweep.document import read_sweep
from tests.fl_dualpriv.sweep.sweep_files import opened

GRID = """
base = "by-class.toml"
seeds = [0, 1]
[set]
rounds = 2
[axes]
"privacy.record.epsilon" = [4.0, inf]
[[rows]]
name = "ours"
[[rows]]
name = "local only"
method = "local-only"
[[when]]
axes = { "privacy.record.epsilon" = inf }
rows = ["local only"]
train.local-learning-rate = 0.05
"""


def test_every_row_has_every_point_and_seed_with_its_own_keys(tmp_path: Path) -> None:
    sweep = opened(tmp_path, GRID)
    cells = cells_of(sweep.document, sweep.settle)
    assert len(cells) == 8
    assert len({cell.folder for cell in cells}) == 8
    for cell in cells:
        ((_, epsilon),) = cell.point
        settings = cell.settings
        assert settings["rounds"] == 2
        assert settings["seed"] == cell.seed
        assert settings["method"] == ("local-only" if cell.row.name == "local only" else "dpfpl")
        # An ε of ∞ means neither clip nor noise.
        assert settings["privacy.record.mechanism"] == ("none" if math.isinf(float(epsilon)) else "gaussian")
        is_special = cell.row.name == "local only" and math.isinf(float(epsilon))
        assert (settings["train.local-learning-rate"] == 0.05) == is_special


def test_a_finite_epsilon_brings_noise_to_a_base_without(tmp_path: Path) -> None:
    text = 'base = "nonprivate.toml"\n[axes]\n"privacy.record.epsilon" = [2.0]\n'
    sweep = opened(tmp_path, text, "nonprivate.toml")
    (cell,) = cells_of(sweep.document, sweep.settle)
    assert cell.settings["privacy.record.mechanism"] == "gaussian"
    assert cell.settings["privacy.record.epsilon"] == 2.0


def test_an_edited_cell_has_another_folder_and_others_keep_theirs(tmp_path: Path) -> None:
    before = opened(tmp_path, GRID)
    after = opened(tmp_path, GRID.replace("0.05", "0.06"))
    old, new = ({c.folder for c in cells_of(s.document, s.settle)} for s in (before, after))
    assert len(old & new) == 6
    assert len(old - new) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sedes = [0]", "sedes: unknown; did you mean seeds?"),
        ("", "there is no base and no row"),
        ('base = "nowhere.toml"', "no such file beside the sweep file"),
        ('base = "by-class.toml"\nseeds = [0, 0]', "has a seed twice"),
        ('base = "by-class.toml"\nseeds = []', "must be a list of whole numbers from 0"),
        ('base = "by-class.toml"\nseeds = 3', "must be a list of whole numbers from 0"),
        ('base = "by-class.toml"\n[axes]\nrounds = 2', "axes.rounds = 2: must be a list of"),
        ('base = "by-class.toml"\n[axes]\nrounds = []', r"axes.rounds = \[\]: must be a list of"),
        ('base = "by-class.toml"\n[axes]\nrounds = [1, 1]', "has a value twice"),
        ('base = "by-class.toml"\n[set]\nseed = 1', "set.seed: is decided by seeds"),
        ('base = "by-class.toml"\n[set]\nrounds = 1\n[axes]\nrounds = [1]', "set.rounds: is an axis"),
        ('base = "by-class.toml"\n[[rows]]\nmethod = "full"', r"rows\[1\].name is missing"),
        ('[[rows]]\nname = "a"', r"rows\[a\].base is missing"),
        ('base = "by-class.toml"\n[[rows]]\nname = "a"\n[[rows]]\nname = "a"', "two rows have this name"),
        ('base = "by-class.toml"\n[[when]]\nrows = ["b"]', "no such row; there are by-class"),
        ('base = "by-class.toml"\n[[when]]\naxes = { rounds = 3 }', "no such value of the axes"),
        ('base = "by-class.toml"\n[[rows]]\nname = "a"\ntunes = ["rounds"]', r"there is no \[tune\]"),
        (
            'base = "by-class.toml"\nseeds = [0]\n[tune]\nseeds = [0]\n',
            r"tune.seeds = \[0\]: are seeds of the table too",
        ),
        (
            'base = "by-class.toml"\n[[rows]]\nname = "a"\ntunes = ["rounds"]\n[tune]\nseeds = [7]\ntrials = 2\n',
            r"rounds has no values in \[tune.grids\]",
        ),
        (
            'base = "by-class.toml"\n[[rows]]\nname = "a"\ntunes = ["rounds"]\n'
            "[tune]\nseeds = [7]\ntrials = 3\n[tune.grids]\nrounds = [1, 2]\n",
            "3 trials, but only 2 combinations",
        ),
        ('base = "by-class.toml"\n[tune]\nseeds = [7]\ntrials = 1\nfinalists = 2', "must be at most tune.trials = 1"),
        ('base = "by-class.toml"\n[tune]\ntrials = 1.5\nseeds = [7]', "must be a whole number from 1"),
        ('base = "by-class.toml"\nrows = "a"', r"write each row as \[\[rows\]\]"),
        ('base = "by-class.toml"\nset = 3', "must be a table of configuration keys"),
        ("base = ", "cannot be read"),
        ('base = ""', "no such file beside the sweep file"),
        ('base = "by-class.toml"\n[axes]\nseed = [1, 2]', "axes.seed: is decided by seeds"),
        ('base = "by-class.toml"\n[axes]\n"privacy.record.epsilon" = [4, 4.0]', "has a value twice"),
        ('base = "by-class.toml"\n[axes]\n"privacy.record.epsilon" = [-inf, 4.0]', "must not hold nan or -inf"),
        ('base = "by-class.toml"\n[axes]\n"privacy.record.epsilon" = [nan]', "must not hold nan or -inf"),
        ('base = "by-class.toml"\nmade-data = "yes"', "must be true or false"),
        ('base = "by-class.toml"\n[[rows]]\nname = "free rival"', "every table has a line of this name"),
        (
            'base = "by-class.toml"\n[[rows]]\nname = "a"\ntunes = ["seed"]\n[tune]\nseeds = [7]\ntrials = 1\n'
            "[tune.grids]\nseed = [3]\n",
            r"rows\[a\].tunes: seed is decided by the sweep",
        ),
        (
            'base = "by-class.toml"\n[axes]\nrounds = [5]\n[[rows]]\nname = "a"\ntunes = ["rounds"]\n[tune]\n'
            "seeds = [7]\ntrials = 1\n[tune.grids]\nrounds = [3]\n",
            r"rows\[a\].tunes: rounds is an axis",
        ),
        ('base = "by-class.toml"\n[axes]\nrounds = [1]\n[[when]]\naxes = { rounds = true }', "no such value of the"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, text)


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 problems") as error:
        opened(tmp_path, 'sedes = [0]\nbase = "nowhere.toml"\n[axes]\nrounds = 2\n')
    assert len(str(error.value).splitlines()) == 4


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sweep(tmp_path / "none.toml")


def test_all_bad_cells_come_in_one_message_and_name_the_cell(tmp_path: Path) -> None:
    text = GRID.replace("rounds = 2", "rounds = 2\ntrain.local-steps = -1\ntrian.top-m = 1")
    sweep = opened(tmp_path, text)
    with pytest.raises(ConfigError, match="no cell was started") as error:
        cells_of(sweep.document, sweep.settle)
    assert "local only, ε = 4, seed 0" in str(error.value)
    assert "ours, ε = ∞, seed 0" in str(error.value)
    assert "trian.top-m" in str(error.value)


@pytest.mark.parametrize("value", ['"abc"', "true"])
def test_an_epsilon_that_is_no_number_is_one_message(tmp_path: Path, value: str) -> None:
    sweep = opened(tmp_path, f'base = "by-class.toml"\n[set]\n"privacy.record.epsilon" = {value}\n')
    with pytest.raises(ConfigError, match=r"privacy\.record\.epsilon"):
        cells_of(sweep.document, sweep.settle)


def test_an_axis_of_client_level_epsilon_has_client_level_noise(tmp_path: Path) -> None:
    # The app's default is no mechanism at client level.
    text = 'base = "by-class.toml"\n[set]\n"privacy.client.expected-cohort" = 5.0\n'
    text += '[axes]\n"privacy.client.epsilon" = [1.0, inf]\n'
    sweep = opened(tmp_path, text)
    noised, plain = cells_of(sweep.document, sweep.settle)[:: len(sweep.document.seeds)]
    assert noised.settings["privacy.client.mechanism"] == "gaussian"
    assert plain.settings["privacy.client.mechanism"] == "none"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('"privacy.record.mechanism" = "none"', "leaves the axis privacy.record.epsilon without effect"),
        ('"privacy.record.calibrate-to" = "noise-multiplier"', "leaves the axis privacy.record.epsilon without effect"),
    ],
)
def test_a_row_that_takes_the_effect_of_an_axis_is_refused(tmp_path: Path, keys: str, message: str) -> None:
    text = f'base = "by-class.toml"\n[axes]\n"privacy.record.epsilon" = [4.0]\n[[rows]]\nname = "a"\n{keys}\n'
    sweep = opened(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        cells_of(sweep.document, sweep.settle)


def test_the_content_of_a_file_of_classes_is_a_part_of_a_cell(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    classes = tmp_path / "classes.json"
    keys = f'"data.ref" = "folder"\n"data.path" = "{images}"\n"data.classes" = "{classes}"\n'
    folders = []
    for content in ('{"class-names": {"a": "cat"}}', '{"class-names": {"a": "dog"}}'):
        classes.write_text(content)
        sweep = opened(tmp_path, f'base = "by-class.toml"\n[set]\n{keys}')
        folders.append({cell.folder for cell in cells_of(sweep.document, sweep.settle)})
    assert not folders[0] & folders[1]


def test_candidates_of_a_file_are_a_part_of_a_cell(tmp_path: Path) -> None:
    file = tmp_path / "candidates.txt"
    folders = []
    for content in ("a photo of a {}\n", "a sketch of a {}\n"):
        file.write_text(content)
        sweep = opened(tmp_path, f'base = "by-class.toml"\n[set]\n"prompt.candidates" = "{file}"\n')
        folders.append({cell.folder for cell in cells_of(sweep.document, sweep.settle)})
    assert not folders[0] & folders[1]


def test_names_that_read_alike_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["a b", "a_b", "x" * 100, "x" * 99 + "y", "odd/\\u0000|name"]
    text = 'base = "by-class.toml"\n' + "".join(f'[[rows]]\nname = "{name}"\n' for name in names)
    sweep = opened(tmp_path, text)
    folders = [cell.folder for cell in cells_of(sweep.document, sweep.settle)]
    assert len(set(folders)) == len(names)
    assert all("/" not in folder and "\0" not in folder and len(folder) < 100 for folder in folders)


def test_resources_are_no_part_of_a_cell(tmp_path: Path) -> None:
    folders = []
    for keys in ("", '"resources.workspace-mib" = 64\n'):
        sweep = opened(tmp_path, f'base = "by-class.toml"\n[set]\nrounds = 2\n{keys}')
        folders.append([cell.folder for cell in cells_of(sweep.document, sweep.settle)])
    assert folders[0] == folders[1]


def test_a_tuned_key_is_not_set_on_the_command_line(tmp_path: Path) -> None:
    text = 'base = "by-class.toml"\n[[rows]]\nname = "a"\ntunes = ["rounds"]\n[tune]\nseeds = [7]\ntrials = 1\n'
    sweep = opened(tmp_path, text + "[tune.grids]\nrounds = [1, 2]\n")
    with pytest.raises(ConfigError, match="is tuned by a row"):
        sweep.document.cut({"rounds": 3}, None)
