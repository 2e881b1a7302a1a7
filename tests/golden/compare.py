"""Run the golden cases with the code of two commits on this machine, and compare prompts, ledgers and results.

Tensors are compared bit by bit, with the metadata of their files; ledgers without clock readings; of the results the
accuracies, the releases with their ε, and the notes. Each commit computes its image features itself.

Usage: python tests/golden/compare.py START [END] [--only NAME ...]
       python tests/golden/compare.py START --here          (END is the work tree as it stands)

The digests of a commit are kept in ``build/golden``: a second comparison with the same START runs only END.
The script exits 1 if any case differs or fails.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, Case
from safetensors import safe_open
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "golden"
_TOKEN = "run-token"  # two runs never share one


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor in each file of prompts, and of each ledger without its clock readings."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            key = f"{file.relative_to(folder).as_posix()}:{name}"
            found[key] = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes()).hexdigest()
        with safe_open(file, framework="numpy") as content:
            metadata = {key: value for key, value in (content.metadata() or {}).items() if key != _TOKEN}
        found[f"{file.relative_to(folder).as_posix()} metadata"] = _digest(metadata)
    for file in sorted(folder.rglob("ledger.jsonl")):
        found[file.relative_to(folder).as_posix()] = _digest(_timeless(file.read_text(encoding="utf-8")))
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        scores = {
            f"{when} {where}": summary["accuracy"][when][where]
            for when in ("zero_shot", "final")
            for where in ("local", "neighbour")
        }
        lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        found["summary.json"] = _digest([scores, summary["privacy"], summary["notes"], summary["rounds"]])
        found["rounds.jsonl"] = _digest([json.loads(line) for line in lines])
    return found


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _timeless(ledger: str) -> list[dict[str, object]]:
    """The lines of a ledger without clock readings, with the place of a run in it instead of its random token."""
    runs: dict[str, int] = {}
    lines = [json.loads(line) for line in ledger.splitlines()]
    for line in lines:
        line.pop("time", None)
        if "run" in line:
            line["run"] = runs.setdefault(line["run"], len(runs))
    return lines


def _command(checkout: Path, home: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The console script of a checkout, whose code comes before the installed one, with a home that caches nothing."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["fl-dualpriv"].partition(":")
    start = f"import sys; sys.argv[0] = 'fl-dualpriv'; from {module} import {name}; {name}()"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HOME": str(home)}
    return [sys.executable, "-c", start, *arguments], environment


def _run(checkout: Path, home: Path, case: Case, out: Path, values: tuple[str, ...]) -> str:
    """Run a case; the end of what it wrote if it failed, else empty."""
    settings = [word for value in values for word in ("--set", value)]
    arguments = ("run", str(checkout / case.config), "--engine", "local", "--out", str(out), "--overwrite", *settings)
    command, environment = _command(checkout, home, *arguments)
    if case.is_cut_off:
        _kill_after_first_round(command, environment, checkout, out)
        command, environment = _command(checkout, home, "run", "--resume", str(out), "--engine", "local")
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]


def _kill_after_first_round(command: list[str], environment: dict[str, str], checkout: Path, out: Path) -> None:
    process = subprocess.Popen(
        command, env=environment, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    rounds, deadline = out / "rounds.jsonl", time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if rounds.exists() and len(rounds.read_text(encoding="utf-8").splitlines()) >= 2:  # the un-tuned line, round 1
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()


def run_cases(checkout: Path, cases: list[Case]) -> dict[str, dict[str, str]]:
    """Digests of each case with the code of a checkout; a case that fails has an ``error``."""
    results = {}
    home = tempfile.TemporaryDirectory()  # the cases of a commit share its features
    for case in cases:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            error = _run(checkout, Path(home.name), case, out, case.values)
            if error and case.renamed is not None:
                error = _run(checkout, Path(home.name), case, out, case.renamed)
            results[case.name] = {"error": error} if error else digests(out)
        print(f"  {case.name}: {time.monotonic() - start:.0f} s{', FAILED' if error else ''}", flush=True)
        if error:
            print(error)
    home.cleanup()
    return results


def digests_of(commit: str, cases: list[Case]) -> dict[str, dict[str, str]]:
    """Digests of a commit, from ``build/golden`` where they were made before."""
    name = subprocess.run(
        ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    file = KEPT / f"{name}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if missing := [case for case in cases if case.name not in kept or "error" in kept[case.name]]:
        print(f"commit {name[:9]}: {len(missing)} cases")
        with tempfile.TemporaryDirectory() as folder:
            checkout = Path(folder) / "checkout"
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", checkout, name], cwd=ROOT, check=True)
            try:
                kept |= run_cases(checkout, missing)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=ROOT, check=True)
        KEPT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return kept


def differences(start: dict[str, dict[str, str]], end: dict[str, dict[str, str]], cases: list[Case]) -> list[str]:
    """One line for each case that failed or differs, with the first three names that do."""
    found = []
    for case in cases:
        one, two = start[case.name], end[case.name]
        if not one or not two or "error" in one or "error" in two:
            found.append(f"{case.name}: failed")
        elif one != two:
            names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
            found.append(f"{case.name}: {len(names)} of {len(one)} differ: {', '.join(names[:3])}")
    return found


def main() -> int:
    """Compare two commits, or a commit and the work tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start")
    parser.add_argument("end", nargs="?", default="HEAD")
    parser.add_argument("--here", action="store_true", help="END is the work tree as it stands")
    parser.add_argument("--only", nargs="*", default=None, metavar="NAME")
    chosen = parser.parse_args()
    cases = [case for case in CASES if chosen.only is None or case.name in chosen.only]
    start = digests_of(chosen.start, cases)
    if chosen.here:
        print(f"work tree: {len(cases)} cases")
        end = run_cases(ROOT, cases)
    else:
        end = digests_of(chosen.end, cases)
    found = differences(start, end, cases)
    print("\n".join(found) or f"all {len(cases)} cases are equal bit by bit")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
