"""What a data set is made of, and the published ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True, kw_only=True)
class DataConfiguration:
    """The size of images and the meaning of labels.

    Attributes:
        name: of the data set.
        height, width: that images and label maps are resized to.
        num_labels: number of labels, those that training sees: 0 ... num_labels - 1.
        label_names: of each label, or empty.
        background: the labels that are not the subject, which subject transfer takes from elsewhere.
        merging: for each value in a label file the label that it stands for, -1 for none. Default: itself.
        ignore_index: pixels of this value in a label file belong to no label.
        flip: whether a mirrored image still has the right labels: no label means left or right.

    Raises:
        ValueError: if a number is out of range, or the number of names is another.

    Example:
        >>> PRESETS["idesigner"].merging[:6]  # background, hat, hair, glove, sunglasses, upper clothes
        (0, 1, 1, 2, 1, 2)
        >>> PRESETS["celebamask-hq"].label("hair")
        13
    """

    name: str
    height: int
    width: int
    num_labels: int
    label_names: tuple[str, ...] = ()
    background: tuple[int, ...] = (0,)
    merging: tuple[int, ...] | None = None
    ignore_index: int | None = 255
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.label_names and len(self.label_names) != self.num_labels:
            raise ValueError(
                f"label_names: expected {self.num_labels} names, one for each label, got {len(self.label_names)}"
            )
        self._check_labels("background", self.background, lowest=0)
        self._check_labels("merging", self.merging or (), lowest=-1)

    def _check_labels(self, name: str, labels: Iterable[int], lowest: int) -> None:
        wrong = [label for label in labels if not lowest <= label < self.num_labels]
        if wrong:
            raise ValueError(f"{name}: expected labels from {lowest} to {self.num_labels - 1}, got {wrong}")

    @property
    def num_values(self) -> int:
        """Label files hold values from 0 to this, exclusive, and ``ignore_index``."""
        return self.num_labels if self.merging is None else len(self.merging)

    def label(self, name: str) -> int:
        """The label of a name, or of a number in digits.

        Raises:
            InputError: if there is no such label.
        """
        if name in self.label_names:
            return self.label_names.index(name)
        if name.isdecimal() and int(name) < self.num_labels:
            return int(name)
        names = f" or one of {', '.join(self.label_names)}" if self.label_names else ""
        raise InputError(f"label {name!r}: expected a number from 0 to {self.num_labels - 1}{names}")

    def label_name(self, label: int) -> str:
        """The name of a label, or its number in digits."""
        return self.label_names[label] if self.label_names else str(label)


def merging_table(num_values: int, others: int, groups: Mapping[int, Iterable[int]]) -> tuple[int, ...]:
    """Which label each value of a label file stands for.

    Args:
        num_values: how many values there are.
        others: the label of values that no group names.
        groups: the values that each label stands for.

    Raises:
        ValueError: if a value is out of range or in two groups.

    Example:
        >>> merging_table(5, 2, {0: [0], 1: [1, 4]})
        (0, 1, 2, 2, 1)
    """
    table: dict[int, int] = {}
    for label, values in groups.items():
        for value in values:
            if not 0 <= value < num_values or value in table:
                raise ValueError(f"groups: expected each value from 0 to {num_values - 1} at most once, got {value}")
            table[value] = label
    return tuple(table.get(value, others) for value in range(num_values))


_CELEBAMASK_HQ_NAMES = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth"),
    *("u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)

PRESETS: Mapping[str, DataConfiguration] = {
    configuration.name: configuration
    for configuration in (
        DataConfiguration(
            name="idesigner",
            height=256,
            width=170,
            num_labels=3,
            label_names=("background", "face", "body"),
            # Of the twenty labels of human parsing, hat, hair, sunglasses and face become the face.
            merging=merging_table(20, 2, {0: [0], 1: [1, 2, 4, 13]}),
            flip=True,
        ),
        # Labels name left and right eyes, brows and ears.
        DataConfiguration(
            name="celebamask-hq", height=256, width=256, num_labels=19, label_names=_CELEBAMASK_HQ_NAMES, flip=False
        ),
        DataConfiguration(name="ade20k", height=256, width=256, num_labels=151, flip=True),
        DataConfiguration(
            name="tiny",
            height=64,
            width=64,
            num_labels=6,
            label_names=("background", "skin", "hair", "top", "bottom", "shoes"),
            flip=True,
        ),
    )
}


def preset(name: str) -> DataConfiguration:
    """The configuration of a data set by its name.

    Raises:
        InputError: if there is none.

    Example:
        >>> preset("ade20k").num_labels
        151
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise InputError(f"preset {name!r}: expected one of {', '.join(PRESETS)}") from None
