"""A whole deployment on this machine: real SuperLink and SuperNodes over TLS, and what must not happen to them.

    python deploy/rehearsal.py OUT [--rounds 5]

Makes certificates, a SuperLink that asks its nodes who they are, and three nodes with image folders, state folders and
budgets of their own, in network namespaces where this machine permits them. A stranger's key and another CA are
refused. In mid-run one node is killed (SIGKILL, all its processes) and started anew; its prompt and ledger go on. Then
the run's prompts are exported where they lie and must predict the nodes' held-out images with the accuracy of the run.
Exit status 0 if all of it held; ``OUT/report.json`` says what was seen, and the logs are beside it.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sites import NODES, Sites, wait_until

from fl_dualpriv.flower import programs, supervisor

KILLED = 1
"""The node that is killed, while it works for round `KILLED_IN`; it comes back when that round has ended without it."""
KILLED_IN = 2


class Failed(Exception):
    """Something did not go as it must."""


def demand(holds: bool, what: str) -> None:
    """Go on only if it holds."""
    if not holds:
        raise Failed(what)


@dataclass(kw_only=True)
class Rehearsal:
    """The script's steps, in order.

    Attributes:
        sites: The machines, or what stands for them.
        rounds: Of the run.
        report: What was seen.
    """

    sites: Sites
    rounds: int
    report: dict[str, Any] = field(default_factory=dict)

    def play(self) -> None:
        """All of it.

        Raises:
            Failed: At the first thing that is not as it must be.
        """
        sites, start = self.sites, time.monotonic()
        self.report["nodes in network namespaces"] = bool(sites.network.spaces)
        sites.start_superlink()
        nodes = [sites.start_node(number, waits=False) for number in range(NODES)]
        self.refusals()
        for node in nodes:
            sites.wait_for(node)
        self.report["joined after seconds"] = round(time.monotonic() - start, 1)
        sites.submit(self.rounds)
        self.kill_and_restart(nodes[KILLED])
        wait_until(lambda: sites.ended() is not None, 600, "the end of the run")
        demand(sites.ended() == "summary.json", f"the run failed: {sites.read('error.json')}")
        self.check_run()
        self.check_exports()
        self.report["seconds"] = round(time.monotonic() - start, 1)

    def refusals(self) -> None:
        """A node that nobody registered, and one whose CA is not the server's, do not get in."""
        sites = self.sites
        refused = [
            (name, sites.start_node(number, name=name, certificates=certificates, waits=False, retries=0))
            for name, number, certificates in (
                ("stranger", NODES, sites.root / "certs"),
                ("other-ca", NODES, sites.other_ca()),
            )
        ]
        for name, node in refused:
            wait_until(lambda node=node: node.process.poll() is not None, 120, f"{name} to be refused")
            said = node.log.read_text(errors="replace")
            demand("SuperNode ID" not in said, f"{name} joined")
            demand(node.process.returncode != 0, f"{name} ended with status 0")
            reason = said.partition("Failed to initialize the connection to the SuperLink.\n")[2].partition("\n")[0]
            demand(name == "stranger" or "CERTIFICATE_VERIFY_FAILED" in reason, f"{name}: {said}")
            self.report[f"{name} refused"] = reason
        check = sites.check_node(0, sites.other_ca())
        demand(check.returncode == 1 and "not signed by this CA" in check.stdout, f"node check: {check.stdout}")
        check = sites.check_node(0)
        demand(check.returncode == 0, f"node check: {check.stdout}{check.stderr}")
        self.report["node check"] = check.stdout.splitlines()

    def kill_and_restart(self, node: Any) -> None:
        """SIGKILL to every process of a node while it works, and a new start from the same file."""
        sites = self.sites
        wait_until(lambda: node.said(f"ROUND {KILLED_IN}]") or sites.ended() is not None, 600, f"round {KILLED_IN}")
        demand(sites.ended() is None, f"the run ended before the kill: {sites.read('error.json')}")
        before = sites.ledger(KILLED)
        supervisor.kill(supervisor.descendants(node.process.pid))
        node.process.wait(timeout=60)
        self.report["killed with rounds in the ledger"] = len(before)
        wait_until(
            lambda: len(sites.rounds()) > KILLED_IN or sites.ended() is not None, 600, "a round without the node"
        )
        again = sites.start_node(KILLED, name=f"node-{KILLED}-again")
        demand(sites.ledger(KILLED)[: len(before)] == before, "the ledger lost events")
        wait_until(lambda: again.said("health: joined") or sites.ended() is not None, 600, "a health line")
        self.report["health after the kill"] = again.lines("health: joined")[0]

    def check_run(self) -> None:
        """All rounds were made; the killed node missed some and no more, and released nothing twice."""
        sites = self.sites
        summary, totals = json.loads(sites.read("summary.json")), json.loads(sites.read("operator/totals.json"))
        ledgers = [sites.ledger(n) for n in range(NODES)]
        demand(summary["rounds"] == self.rounds, f"{summary['rounds']} rounds")
        for number, events in enumerate(ledgers):
            rounds = [event["server_round"] for event in events]
            demand(len(set(rounds)) == len(rounds), f"node {number} answered a round twice: {rounds}")
            demand(len({event["run"] for event in events}) == 1, f"node {number} has more than one run")
            least = 2 if number == KILLED else self.rounds
            demand(least <= len(rounds) <= self.rounds, f"node {number} answered {rounds}")
        back = [event["server_round"] for event in ledgers[KILLED] if event["server_round"] > KILLED_IN]
        demand(self.rounds in back, f"the killed node did not come back for good: {back}")
        self.report |= {
            "rounds": [[event["server_round"] for event in events] for events in ledgers],
            "failures": totals["failures"],
            "accuracy": summary["accuracy"]["final"],
            "run seconds": round(totals["seconds"], 1),
            "rounds end after": [round(line["seconds"], 1) for line in sites.progress()],
        }

    def check_exports(self) -> None:
        """Each owner exports the prompt that lies on their node; it is as right on their held-out images as the run."""
        sites, rates = self.sites, []
        for number in range(NODES):
            images = sorted((sites.home(number) / "images" / "test").glob("*/*.png"))
            said = sites.predict(number, sites.export(number), images)
            demand(len(said) == len(images), f"{len(said)} predictions for {len(images)} images")
            named = [sites.class_name(image.parent.name) for image in images]
            rates.append(sum(map(str.__eq__, said, named)) / len(images))
        run = self.report["accuracy"]["local"]
        demand(abs(sum(rates) / NODES - run) < 1e-6, f"exported prompts are right in {rates}, the run says {run}")
        self.report["exported prompts are right in"] = rates


@contextlib.contextmanager
def _told(rehearsal: Rehearsal) -> Iterator[None]:
    """Leave the report, whatever happened."""
    failed = "nothing"
    try:
        yield
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"
        raise
    finally:
        content = json.dumps(rehearsal.report | {"failed": failed}, indent=1, ensure_ascii=False)
        (rehearsal.sites.root / "report.json").write_text(content + "\n", encoding="utf-8")


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--app", type=Path, default=Path(__file__).parents[1], help="the app that runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-namespaces", action="store_true", help="all nodes on 127.0.0.1")
    options = parser.parse_args()
    if options.rounds < KILLED_IN + 2:
        parser.error(f"--rounds: at least {KILLED_IN + 2}, for a node is killed in round {KILLED_IN}")
    if options.out.exists():
        parser.error(f"{options.out} exists: give a new folder")
    if programs.find("flower-superlink") is None:
        parser.error(f"flower-superlink is in none of {programs.places()}")
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that namespaces go, too
    with Sites.prepared(options.out.absolute(), options.app.absolute(), not options.no_namespaces) as sites:
        rehearsal = Rehearsal(sites=sites, rounds=options.rounds)
        try:
            with _told(rehearsal):
                rehearsal.play()
        except (Failed, TimeoutError, subprocess.SubprocessError) as error:
            print(f"failed: {error}\nlogs: {sites.root}", file=sys.stderr)
            return 1
    print((options.out / "report.json").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
