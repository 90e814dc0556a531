"""A run's measurements as tidy rows: step, metric, layer, head, value."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sinkscope.bb.measurement import Phenomena
from sinkscope.errors import ModelError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("step", "metric", "layer", "head", "value")


class Log:
    """Rows in the order they were measured. Layer and head are -1 where a metric has none."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str | int | float]] = []
        self._steps: set[int] = set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, step: int, metric: str, value: float) -> None:
        """Add one number that has neither layer nor head."""
        self.rows.append(dict(zip(COLUMNS, (step, metric, -1, -1, value), strict=True)))

    def extend(self, step: int, found: Phenomena) -> None:
        """Add everything measured at a step, which from then on is `in` the log."""
        self._steps.add(step)
        self.rows.extend({"step": step, **row} for row in found.rows())

    def frame(self) -> pd.DataFrame:
        """The rows as a frame."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def write(self, path: Path) -> None:
        """Write as CSV, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path, until: int) -> Log:
        """Read back the rows up to a step: later ones belong to work that was lost with a kill."""
        log = cls()
        if not path.exists():
            raise ModelError(
                f"{path} is missing beside its checkpoint: put it back, or start in a new folder"
            )
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if int(row["step"]) <= until:
                    log.rows.append(
                        {
                            "step": int(row["step"]),
                            "metric": row["metric"],
                            "layer": int(row["layer"]),
                            "head": int(row["head"]),
                            "value": float(row["value"]),
                        }
                    )
        log._steps = {int(row["step"]) for row in log.rows}
        return log
