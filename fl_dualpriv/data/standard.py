"""Standard data sets: where their owners give them, and the script of the repository that makes their folder."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StandardData:
    """A data set that a script of ``tools/data`` turns into a folder.

    Attributes:
        name: Its usual name.
        module: Module of the script, ``python -m tools.data.MODULE``.
        classes: Number of classes.
        domains: Number of domains; 0 without.
        page: Page of its owners.
    """

    name: str
    module: str
    classes: int
    page: str
    domains: int = 0


STANDARD = (
    StandardData(
        name="Caltech-101", module="caltech101", classes=100, page="https://data.caltech.edu/records/mzrjq-6wc02"
    ),
    StandardData(
        name="Oxford-IIIT Pets", module="oxford_pets", classes=37, page="https://www.robots.ox.ac.uk/~vgg/data/pets/"
    ),
    StandardData(
        name="Oxford Flowers-102",
        module="oxford_flowers",
        classes=102,
        page="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    StandardData(
        name="Food-101",
        module="food101",
        classes=101,
        page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    StandardData(name="DTD", module="dtd", classes=47, page="https://www.robots.ox.ac.uk/~vgg/data/dtd/"),
    StandardData(name="CIFAR-100", module="cifar100", classes=100, page="https://www.cs.toronto.edu/~kriz/cifar.html"),
    StandardData(name="EuroSAT", module="eurosat", classes=10, page="https://github.com/phelber/EuroSAT"),
    StandardData(name="DomainNet", module="domainnet", classes=345, domains=6, page="http://ai.bu.edu/M3SDA/"),
    StandardData(
        name="Office-Home",
        module="office_home",
        classes=65,
        domains=4,
        page="https://www.hemanthdv.org/officeHomeDataset.html",
    ),
)
"""All of them, in the order of ``fl-dualpriv data list``. Caltech-101 is counted without its two left-out folders."""
