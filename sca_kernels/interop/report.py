"""What a swap did, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class SwapRow(NamedTuple):
    """A published module.

    Attributes:
        path: of the module in the model, "" for the model itself.
        kind: its published name.
        reason: why it runs its own code; None if it does not.
        within: the path of the module that computes what this one would; None if it is called.
    """

    path: str
    kind: str
    reason: str | None = None
    within: str | None = None

    @property
    def runs(self) -> str:
        """What it runs now."""
        if self.reason is not None:
            return f"its own code: {self.reason}"
        return "sca_kernels" if self.within is None else f"sca_kernels, as part of {self.within or 'the model'}"


@dataclass(frozen=True)
class SwapReport:
    """What :func:`sca_kernels.swap_in` found, as a table when printed.

    Modules that are computed as part of others are in :attr:`rows` only.

    Attributes:
        rows: the published modules, in the order of ``named_modules``.

    Example:
        >>> rows = SwapRow("up.mod_0", "SCAMModulation"), SwapRow("up.mod_1", "SCAMModulation", "it carries a hook")
        >>> report = SwapReport(rows)
        >>> print(report)
        module    kind            runs
        up.mod_0  SCAMModulation  sca_kernels
        up.mod_1  SCAMModulation  its own code: it carries a hook
        >>> [row.path for row in report.left_alone]
        ['up.mod_1']
    """

    rows: tuple[SwapRow, ...]

    @property
    def swapped(self) -> tuple[SwapRow, ...]:
        """The modules that do not run their own code."""
        return tuple(row for row in self.rows if row.reason is None)

    @property
    def left_alone(self) -> tuple[SwapRow, ...]:
        """The modules that run their own code."""
        return tuple(row for row in self.rows if row.reason is not None)

    def __str__(self) -> str:
        shown = [row for row in self.rows if row.within is None or row.reason is not None]
        cells = [("module", "kind", "runs"), *((row.path or "(the model)", row.kind, row.runs) for row in shown)]
        widths = [max(len(line[column]) for line in cells) for column in range(2)]
        lines = [f"{path:{widths[0]}}  {kind:{widths[1]}}  {runs}" for path, kind, runs in cells]
        hidden = len(self.rows) - len(shown)
        if not self.rows:
            lines.append("no published module was found")
        if hidden:
            lines.append(f"{hidden} more are computed as parts of these")
        return "\n".join(lines)
