"""Command line that the scripts share: options, the summary, and one message for each kind of wrong input."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from fl_dualpriv.errors import ConfigError
from tools.data.archives import Archives, few
from tools.data.layout import CLASSES, Plan, check, made_at_once, write

DEFAULTS = {"seed": 0, "val_fraction": 0.1}
_CHUNK = 2**20


def parser(description: str | None, *, coop: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the options that the scripts share.

    Args:
        description: Docstring of the script.
        coop: True if CoOp has a split file for the data set.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--archive", type=Path, action="append", required=True, help="an archive or its unpacked folder; once for each"
    )
    options.add_argument("--out", type=Path, required=True, help="the folder to make, which may not exist")
    if coop:
        options.add_argument("--split", type=Path, help="CoOp's split_zhou_NAME.json")
    options.add_argument("--seed", type=int, help="seed of what the script cuts by itself (0)")
    options.add_argument("--val-fraction", type=float, help="share of train, where the owners' split has no val (0.1)")
    return options


def run(
    name: str,
    page: str,
    plan_of: Callable[[Archives, argparse.Namespace], Plan],
    args: argparse.Namespace,
    nested: Collection[str] = (),
) -> None:
    """Make the folder and print a summary, or print what is wrong and exit with status 2.

    Args:
        name: Name of the data set.
        page: Web page of its owners.
        plan_of: Function that returns the plan from the archives and the options.
        args: Options of `parser`, and the script's own ones.
        nested: Names of archives inside the archives that are opened too.

    Raises:
        SystemExit: If the input is wrong or the folder cannot be written.
    """
    try:
        _check_numbers(args)
        with made_at_once(args.out) as scratch, Archives(args.archive, scratch, page, nested) as archives:
            plan = _plan(plan_of, archives, args)
            _say(f"{name}: copying {len(plan.pictures)} images to {args.out}")
            left_out = archives.left_out({picture.member.path for picture in plan.pictures})
            write(plan, _provenance(name, page, plan, args, left_out), scratch)
    except ConfigError as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"{args.out} cannot be made: {error}; check permissions and free space, then run the script again")
    for line in _summary(name, plan, args, left_out):
        _say(line)


def _say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)  # a file may have any name


def _stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def _check_numbers(args: argparse.Namespace) -> None:
    problems = []
    if args.seed is not None and args.seed < 0:
        problems.append(f"--seed {args.seed} is not allowed; give an integer of at least 0")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        problems.append(f"--val-fraction {args.val_fraction} is not allowed; give a number above 0 and below 1")
    if problems:
        raise ConfigError("\n".join(problems))


def _plan(
    plan_of: Callable[[Archives, argparse.Namespace], Plan], archives: Archives, args: argparse.Namespace
) -> Plan:
    """Return the checked plan; an option that it does not follow is refused if it was given."""
    given = [option for option in DEFAULTS if getattr(args, option) is not None]
    for option in DEFAULTS.keys() - set(given):
        setattr(args, option, DEFAULTS[option])
    plan = plan_of(archives, args)
    if idle := [f"--{option.replace('_', '-')}" for option in given if option not in plan.rule.options]:
        raise ConfigError(f"{' and '.join(idle)} would change nothing: the split is {plan.rule.words}. Leave it out")
    check(plan)
    return plan


def _provenance(name: str, page: str, plan: Plan, args: argparse.Namespace, left_out: dict[str, int]) -> dict[str, Any]:
    files = [path for path in (getattr(args, "split", None), getattr(args, "names", None)) if path]
    return {
        "data-set": name,
        "page": page,
        "archives": [_identity(path) for path in args.archive],
        "other-files": [_identity(path) for path in files],
        "split": plan.rule.words,
        **{option.replace("_", "-"): getattr(args, option) for option in plan.rule.options},
        "counts": plan.counts(),
        "classes": len(plan.names),
        "domains": plan.domains,
        "left-out": left_out,
    }


def _identity(path: Path) -> dict[str, Any]:
    """Return name, size and hash of a file; those of a folder are of its list of paths and their hashes."""
    if not path.is_dir():
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return {
        "folder": path.resolve().name,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _summary(name: str, plan: Plan, args: argparse.Namespace, left_out: dict[str, int]) -> list[str]:
    counts = ", ".join(f"{count} {split}" for split, count in plan.counts().items())
    domains = f" in {len(plan.domains)} domains" if plan.domains else ""
    used = "".join(f"; {option.replace('_', '-')} {getattr(args, option)}" for option in plan.rule.options)
    lines = [f"{name}: {len(plan.names)} classes{domains}; images: {counts}", f"split: {plan.rule.words}{used}"]
    if left_out:
        kinds = few([f"{count} {kind}" for kind, count in left_out.items()])
        lines.append(f"left out: {sum(left_out.values())} files ({kinds}); provenance.json names all kinds")
    settings = (
        f'data.ref = "folder", data.path = "{args.out.resolve()}", data.classes = "{args.out.resolve() / CLASSES}"'
    )
    return [*lines, f"settings: {settings}" + (', data.partition = "by-domain"' if plan.domains else "")]
