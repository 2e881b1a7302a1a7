"""Tables of Hugging Face `datasets`: found, loaded, and their images decoded. Only this file imports datasets."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.formats.hub_names import PARQUET, is_saved, source_and_configuration
from fl_dualpriv.data.formats.pixels import BadImageError, decode
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.data.layout import Labels, Layout, Reading, Record, layout_of_records
from fl_dualpriv.errors import ConfigError

_NAMES = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True, eq=False)
class HubImages:
    """`ImageDataset` over a column of images that are stored in the table.

    Attributes:
        table: A split of `datasets`; its image column is not decoded.
        column: Name of that column.
        rows: First row of each image, (images,) int64.
        where: Name of the split in messages.
        of: Labels of the images.
    """

    table: Any
    column: str
    rows: np.ndarray
    where: str
    of: Labels

    @property
    def labels(self) -> np.ndarray:
        """Class ids; see `ImageDataset`."""
        return self.of.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; see `ImageDataset`."""
        return self.of.class_names

    @property
    def domains(self) -> np.ndarray | None:
        """Domain ids, or None; see `ImageDataset`."""
        return self.of.domains

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains; see `ImageDataset`."""
        return self.of.domain_names

    @property
    def clients(self) -> np.ndarray | None:
        """Client ids, or None; see `ImageDataset`."""
        return self.of.clients

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names of the clients; see `ImageDataset`."""
        return self.of.client_names

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return split and row of an image, for messages."""
        return f"in row {self.rows[index]} of {self.where}"

    def image(self, index: int) -> Image.Image:
        """Decode one image to upright 8-bit RGB.

        Raises:
            BadImageError: If the image cannot be decoded, or is missing.
        """
        name = self.name(index)
        if self.rows[index] < 0:
            raise BadImageError(f"image {name} has no label")
        try:
            stored = self.table[int(self.rows[index])][self.column] or {}
        except Exception as error:  # pyarrow and datasets raise many kinds on a damaged file
            raise BadImageError(f"image {name} cannot be read: {error}") from error
        if not (content := stored.get("bytes")):
            raise BadImageError(f"image {name} has no bytes, as the others have")
        return decode(content, name)

    @property
    def content_hash(self) -> str:
        """Hash of the table's fingerprint in `datasets` and of the rows; see `ImageDataset.content_hash`."""
        return hashlib.sha256(self.table._fingerprint.encode() + self.rows.tobytes()).hexdigest()

    def unchanged(self, index: int) -> bool:
        """Always True, because tables of `datasets` do not change; see `ImageDataset.unchanged`."""
        return True

    def unreadable(self, index: int) -> int | None:
        """Return None; see `ImageDataset.unreadable`."""
        return None


def table_of(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Return a table of these columns, in memory.

    Raises:
        ImportError: If the package datasets is not installed.
    """
    import datasets

    return datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()})


def hub_columns(name: str) -> tuple[str, ...]:
    """Return the columns of a data set's first split."""
    return tuple(next(iter(load_tables(name).values())).column_names)


def given_hub_splits(name: str) -> frozenset[str]:
    """Return the splits among train, val and test that a data set has."""
    return frozenset(load_tables(name))


def tables_with_train(name: str) -> dict[str, Any]:
    """Return the splits of a data set.

    Raises:
        ConfigError: If it cannot be loaded, or has no split called train.
    """
    tables = dict(load_tables(name))
    if "train" not in tables:
        other_splits = f"it has {', '.join(tables)}" if tables else "nor one called validation or test"
        raise ConfigError(f"data.path = datasets:{name}: it has no split called train; {other_splits}")
    return tables


@functools.lru_cache(maxsize=2)
def load_tables(name: str) -> Mapping[str, Any]:
    """Load a data set, once per process; the result is train, val and test, as far as they exist.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.path = datasets:{name} needs the package datasets; install fl-dualpriv[datasets]"
        ) from error
    source, configuration = source_and_configuration(name)
    place = Path(source).expanduser()
    datasets.disable_progress_bars()
    try:
        if is_saved(place):
            data_set: Any = datasets.load_from_disk(str(place))
        elif place.is_file() and place.suffix.lower() == PARQUET:
            data_set = datasets.load_dataset("parquet", data_files=str(place))
        else:
            data_set = datasets.load_dataset(str(place) if place.exists() else source, configuration or None)
    except Exception as error:  # datasets, the hub and the network each raise different kinds
        words = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"data.path = datasets:{name} cannot be loaded: {type(error).__name__}: {words}") from error
    if isinstance(data_set, datasets.Dataset):  # a single table that was saved without splits
        data_set = {"train": data_set}
    names = {split: next((n for n in options if n in data_set), None) for split, options in _NAMES.items()}
    return {split: data_set[n] for split, n in names.items() if n is not None}


def with_images(table: Any, column: str, where: str) -> Any:
    """Return the table with a column of undecoded images; in a parquet file, it may hold image paths or bytes.

    Raises:
        ConfigError: If the column holds no images.
    """
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow and datasets each raise different kinds
        raise ConfigError(
            f"data.path = {where}: column {column} holds {table.features[column]}, no images; it must hold images, "
            "their bytes or their paths"
        ) from error


def images_of(table: Any, column: str, rows: np.ndarray, where: str, of: Labels, name: str) -> ImageDataset:
    """Return the images of some rows. A table that names files gives the files, with their hashes.

    Args:
        table: A split with a column of undecoded images.
        column: Name of the column.
        rows: First row of each image, (images,); -1 for an image that cannot be used.
        where: Name of the split in messages.
        of: Labels of the images.
        name: Name of the data set, without ``datasets:``. Relative file names count from its folder.
    """
    chunks = table.with_format("arrow")[:][column].chunks  # not combined: the images may fill the memory
    if chunks and all(chunk.field("bytes").null_count == len(chunk) for chunk in chunks):
        place = Path(source_and_configuration(name)[0]).expanduser()
        base = place.parent if place.is_file() else place
        names = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
        paths = [base / path if path else base for path in names]
        return FolderSplit.labelled((paths[row] if row >= 0 else base for row in rows.tolist()), of)
    return HubImages(table, column, rows, where, of)


def read_hub_images(name: str, classes: str, fractions: Mapping[str, float], seed: int, reading: Reading) -> Layout:
    """Read labelled images from a data set of the hub, a saved folder, a parquet file or a folder that datasets reads.

    Class names are those of the label column's feature, if it has names. Otherwise they are the values of the column.
    Arguments as in `listed.read_list`.

    Raises:
        ConfigError: If the data set cannot be loaded, or lacks a column.
    """
    tables, where, group = tables_with_train(name), f"datasets:{name}", reading.group
    records: dict[str, list[Record[int]]] = {}
    of_role = reading.columns.found(tables["train"].column_names, group, f"data.path = {where}")
    declared = tuple(getattr(tables["train"].features[of_role["label"]], "names", None) or ())
    made = {}
    for split, table in tables.items():
        if lacking := [column for column in of_role.values() if column not in table.column_names]:
            raise ConfigError(f"data.path = {where}: split {split} has no column {', '.join(lacking)}")
        labels = _texts(table, of_role["label"])
        groups = _texts(table, of_role[group]) if group else [""] * len(labels)
        records[split] = [
            Record(place=row, label=label, group=own, where=f"{split}, row {row}")
            for row, (label, own) in enumerate(zip(labels, groups, strict=True))
        ]
        only_images = table.select_columns([of_role["image"]])
        made[split] = with_images(only_images, of_role["image"], f"{where}, split {split}")

    def make(split: str, rows: list[int], of: Labels) -> ImageDataset:
        table_of = split if split in made else "train"
        label = f"split {table_of} of {where}"
        return images_of(made[table_of], of_role["image"], np.array(rows, dtype=np.int64), label, of, name)

    return layout_of_records(
        records,
        make,
        classes=classes,
        fractions=fractions,
        seed=seed,
        reading=reading,
        nowhere=-1,
        declared=declared,
    )


def _texts(table: Any, column: str) -> Sequence[str]:
    """Return a column as texts, by the names of its feature if there are any; an empty text for a missing value."""
    names = getattr(table.features[column], "names", None)
    values = table[column]
    if names:
        return [names[value] if value is not None and 0 <= value < len(names) else "" for value in values]
    return ["" if value is None else str(value).strip() for value in values]
