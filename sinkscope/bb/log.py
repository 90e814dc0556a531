"""The measurements of a run as a tidy table: step, metric, layer, head and value."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from sinkscope.bb.measurement import Phenomena
from sinkscope.errors import ModelError
from sinkscope.output import write_file

if TYPE_CHECKING:
    import pandas as pd

_TYPES = {"step": "int64", "metric": object, "layer": "int64", "head": "int64", "value": object}
COLUMNS = tuple(_TYPES)


class Log:
    """Rows in the order of measurement; layer and head are -1 where a metric has none.

    Attributes:
        rows: One dictionary per measured value, with the keys `COLUMNS`.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, str | int | float]] = []
        self._steps: set[int] = set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, step: int, metric: str, value: float) -> None:
        """Add one value without layer and head."""
        self.rows.append(dict(zip(COLUMNS, (step, metric, -1, -1, value), strict=True)))

    def extend(self, step: int, phenomena: Phenomena) -> None:
        """Add all measurements of a step, which is then `in` the log."""
        self._steps.add(step)
        self.rows.extend({"step": step, **row} for row in phenomena.rows())

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a frame with the columns `COLUMNS`."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def as_csv(self) -> str:
        """Return the rows as CSV text, from which numbers are read back exactly."""
        return self.to_frame().to_csv(index=False, na_rep="nan", lineterminator="\n")

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of the rows, by which a checkpoint identifies its log."""
        return hashlib.sha256(self.as_csv().encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the rows as CSV.

        Raises:
            ReportError: If the file cannot be written.
        """
        write_file(path, self.as_csv())

    @classmethod
    def read(cls, path: Path, until: int) -> Log:
        """Read the rows up to a step; later rows are from steps that were lost in a kill.

        Raises:
            ModelError: If there is no such file, or it is not a log.
        """
        import pandas as pd

        if not path.exists():
            raise ModelError(
                f"{path} is missing beside its checkpoint; put it back, or start in a new folder."
            )
        try:
            frame = pd.read_csv(
                io.StringIO(path.read_bytes().decode()), dtype=_TYPES, na_filter=False
            )
            if tuple(frame.columns) != COLUMNS:
                raise ValueError(f"its columns are {', '.join(map(str, frame.columns))}")
            if (frame["step"] < 0).any():
                raise ValueError("a step is negative")
            frame["value"] = [float(text) for text in frame["value"]]  # exactly, unlike pandas
        except (OSError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{path} cannot be read as the log of a run ({reason}); put back the right one, "
                "or start in a new folder."
            ) from error
        log = cls()
        log.rows = frame[frame["step"] <= until].to_dict("records")  # pyright: ignore
        log._steps = {int(row["step"]) for row in log.rows}
        return log
