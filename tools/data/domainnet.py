r"""Make the folder of DomainNet (owner's page: http://ai.bu.edu/M3SDA/).

    python -m tools.data.domainnet --archive clipart.zip --archive clipart_train.txt --archive clipart_test.txt \
        --archive infograph.zip ... --out FOLDER

The archives are those of the cleaned version, one for each of the six domains, with two lists each. --domain leaves out
the others. The class folders lie in one folder per domain, for data.partition = "by-domain". The owners' split has no
val. A domain may lack classes.
"""

import argparse
from collections.abc import Sequence

from fl_dualpriv.errors import ConfigError
from tools.data import command, splits
from tools.data.archives import Archives, few
from tools.data.layout import Plan
from tools.data.splits import Entry

NAME = "DomainNet"
PAGE = "http://ai.bu.edu/M3SDA/"
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
ARCHIVES = tuple(f"{domain}{ending}" for domain in DOMAINS for ending in (".zip", "_train.txt", "_test.txt"))
TEMPLATE = "a photo of a {}."


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: the owners' lists with a val that is cut from train.

    Raises:
        ConfigError: If archives or images are missing, or if a list is wrong.
    """
    domains = sorted(set(args.domain or DOMAINS))
    lists = [(domain, split, f"{domain}_{split}.txt") for domain in domains for split in ("train", "test")]
    wanted = {f"{domain}.zip": (domain,) for domain in domains} | {file: (file,) for _, _, file in lists}
    roots = dict(zip(wanted, archives.locate(wanted), strict=True))
    entries, wrong = [], []
    for domain, split, file in lists:
        for line in filter(None, archives.text(roots[file] + file).splitlines()):
            # Such as "clipart/aircraft_carrier/clipart_001_000001.jpg 0".
            path, _, label = line.rpartition(" ")
            match path.split("/"):
                case [first, folder, name] if first == domain and folder and name and label.isdecimal():
                    entries.append(Entry(split, folder, f"{roots[f'{domain}.zip']}{path}", domain))
                case _:
                    wrong.append(f"{file}: {line!r}")
    if wrong:
        raise ConfigError(
            f"{len(wrong)} lines of the owners' lists are wrong: {few(wrong)}; a line is DOMAIN/CLASS/IMAGE LABEL: "
            f"download the lists of the cleaned version from {PAGE} again"
        )
    pictures = splits.pictures_of(archives, entries, few([file for _, _, file in lists]))
    names = {entry.folder: splits.words(entry.folder) for entry in entries}
    rule = splits.owners_and_val("DOMAIN_train.txt is train, DOMAIN_test.txt is test")
    return Plan(splits.with_val(pictures, args.val_fraction, args.seed), names, TEMPLATE, rule)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    options = command.parser(__doc__, coop=False)
    options.add_argument(
        "--domain", action="append", choices=DOMAINS, help="a domain to take, once for each; all if there is none"
    )
    command.run(NAME, PAGE, plan, options.parse_args(argv))


if __name__ == "__main__":
    main()
