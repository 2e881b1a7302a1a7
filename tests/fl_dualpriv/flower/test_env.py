"""The environment of Flower's programs, and the hook that sets it."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import hook as flower_hook

ROOT = Path(__file__).parents[3]


def test_environment_closes_the_known_traps(tmp_path: Path) -> None:
    variables = flower_env.environment(tmp_path, 20001, 20002)
    expected = {
        "FLWR_HOME": str(tmp_path),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "20001",
        "FLWR_LOCAL_CONTROL_API_PORT": "20002",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ADDRESS": "local",
    }
    assert expected.items() <= variables.items()
    assert all(isinstance(value, str) for value in variables.values())


def test_flower_and_ray_know_the_variables() -> None:
    # A variable that was renamed would be ignored in silence.
    specs = {name: importlib.util.find_spec(name) for name in ("flwr", "ray")}
    folders = {name: Path(spec.origin).parent for name, spec in specs.items() if spec is not None and spec.origin}
    files = [*folders["flwr"].rglob("*.py"), *folders["ray"].glob("_private/*.py")]
    files += [folders["ray"] / "_common/usage/usage_constants.py", folders["ray"] / "core/src/ray/raylet/raylet"]
    text = b"\n".join(file.read_bytes() for file in files)
    names = [name for name in flower_env.environment(Path("/x"), 1, 2) if name.startswith(("FLWR_", "RAY_"))]
    # Ray's core reads each of its settings x from RAY_x, so only x is in its program.
    words = [name.removeprefix("RAY_") if name.removeprefix("RAY_").islower() else name for name in names]
    assert [word for word in words if word.encode() not in text] == []


def test_free_ports_are_distinct_and_free() -> None:
    ports = flower_env.free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_taken_ports_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(flower_env, "_PORTS", range(taken.getsockname()[1], taken.getsockname()[1] + 1))
        with pytest.raises(OSError, match="only 0 of 1"):
            flower_env.free_ports(1)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        pytest.param(["python", "/venv/bin/flwr", "run", "."], "flwr", id="console script"),
        pytest.param(["python", "-I", "-X", "dev", "/venv/bin/flower-superlink"], "flower-superlink", id="options"),
        pytest.param(["python", "-c", "flwr"], "", id="code"),
        pytest.param(["python", "-m", "pytest", "flwr"], "", id="module"),
        pytest.param(["python"], "", id="interactive"),
    ],
)
def test_program(argv: list[str], expected: str) -> None:
    assert flower_hook.program(argv) == expected


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State file of a hook; the changes it makes to this process are undone."""
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin", "OMP_NUM_THREADS": "3"})
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "state.json"
    environment = {"FLWR_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    file.write_text(json.dumps({"environment": environment, "scripts": "/venv/bin"}))
    return file


@pytest.mark.parametrize("name", ["python", "pytest", "flwr.py", "flowerpot", "", "my-flwr"])
def test_other_programs_are_left_alone(name: str, state: Path) -> None:
    before = dict(os.environ)
    assert not flower_hook.apply(name, state)
    assert dict(os.environ) == before


def test_flower_programs_get_the_variables_and_keep_the_users(state: Path, tmp_path: Path) -> None:
    assert flower_hook.apply("flwr", state)
    assert flower_hook.apply("flwr", state)  # a child of a hooked process: PATH does not grow
    assert {name: os.environ[name] for name in os.environ if not name.startswith("PYTEST_")} == {
        "FLWR_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "3",
        "PATH": f"/venv/bin{os.pathsep}/usr/bin",
    }


@pytest.mark.parametrize(
    ("name", "moves"),
    [("flwr", False), ("flower-superlink", False), ("flower-superexec", False), ("flwr-simulation", True)],
)
def test_only_the_simulation_moves_to_an_empty_folder(name: str, moves: bool, state: Path, tmp_path: Path) -> None:
    # The others take relative paths from the user (certificates, databases).
    flower_hook.apply(name, state)
    assert Path.cwd() == (tmp_path / "home" / "empty" if moves else tmp_path)
    assert not moves or list(Path.cwd().iterdir()) == []


def test_a_broken_state_file_is_reported_and_stops_nothing(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state.write_text("{")
    monkeypatch.setattr(sys, "orig_argv", ["python", "/venv/bin/flwr"])
    flower_hook.main(state)
    assert "make setup" in capsys.readouterr().err


def make_venv(folder: Path) -> Path:
    """An environment without packages; returns its site-packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    return next((folder / "lib").glob("python*")) / "site-packages"


def test_install_works_in_a_new_interpreter_and_is_idempotent(tmp_path: Path) -> None:
    prefix = tmp_path / "venv"
    site_packages = make_venv(prefix)
    home = flower_env.install(ROOT, site_packages, prefix)
    first = {file.name: file.read_text() for file in site_packages.glob("_fl_dualpriv*.*")}
    assert flower_env.install(ROOT, site_packages, prefix) == home
    assert {file.name: file.read_text() for file in site_packages.glob("_fl_dualpriv*.*")} == first

    script = prefix / "bin" / "flwr"
    script.write_text("import os; print(os.environ.get('FLWR_HOME'), os.environ['PATH'].split(os.pathsep)[0])")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    output = [
        subprocess.run([prefix / "bin" / "python", *words], env=clean, capture_output=True, text=True, check=True)
        for words in ([str(script)], ["-c", script.read_text()])
    ]
    assert output[0].stdout.split() == [str(home), str(prefix / "bin")]
    assert output[1].stdout.split()[0] == "None"
    assert [run.stderr for run in output] == ["", ""]


def test_each_environment_has_its_own_ports_even_when_copied(tmp_path: Path) -> None:
    ports = set()
    for name in ("a", "b"):
        site_packages = tmp_path / name / "site-packages"
        site_packages.mkdir(parents=True)
        if name == "b":
            (site_packages / "_fl_dualpriv_flower.json").write_bytes(
                (tmp_path / "a" / "site-packages" / "_fl_dualpriv_flower.json").read_bytes()
            )
        flower_env.install(ROOT, site_packages, tmp_path / name)
        variables = json.loads((site_packages / "_fl_dualpriv_flower.json").read_text())["environment"]
        assert variables["FLWR_HOME"] == str(tmp_path / name / "flower")
        ports |= {variables["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"], variables["FLWR_LOCAL_CONTROL_API_PORT"]}
    assert len(ports) == 4


def test_flower_reads_the_default_simulation_from_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.cli.flower_config import read_superlink_connection

    (tmp_path / "site-packages").mkdir()
    home = flower_env.install(ROOT, tmp_path / "site-packages", tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(home))
    connection = read_superlink_connection()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert connection.address == ":local:"
    assert connection.options is not None
    assert connection.options.num_supernodes == config["population"]
    assert connection.options.backend is not None
    assert connection.options.backend.client_resources is not None
    assert connection.options.backend.client_resources.num_cpus == config["resources"]["cpus-per-client"]


def test_other_connections_of_the_user_stay(tmp_path: Path) -> None:
    theirs = (
        '[superlink]\ndefault = "far"\n[superlink.far]\naddress = "host:1"\ninsecure = true\noptions.verbose = true\n'
    )
    (tmp_path / "config.toml").write_text(theirs)
    flower_env.write_flower_config(tmp_path, "127.0.0.1:20000")
    parsed = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]
    assert parsed == {
        "default": "local",
        "local": {"address": "127.0.0.1:20000", "insecure": True},
        "far": {"address": "host:1", "insecure": True, "options": {"verbose": True}},
    }


def test_stop_touches_no_other_process(tmp_path: Path) -> None:
    assert not flower_env.stop(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        (tmp_path / "superlink.pid").write_text(str(stranger.pid))  # the number went to someone else
        assert not flower_env.stop(tmp_path)
        assert stranger.poll() is None
        stranger.communicate(b"\n")
    assert stranger.returncode == 0


def test_exports_quote() -> None:
    assert flower_env.exports({"A": "b c", "D": "1"}) == "export A='b c'\nexport D=1"
