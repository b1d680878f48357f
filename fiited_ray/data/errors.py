"""What is raised for data that cannot be used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class DataError(ValueError):
    """Data that cannot be used; the message names file, column, row or position, and what to do.

    row: which row of the table at hand, where it is one row's fault: readers turn it into a row of a file.
    rows: bool [rows of the table], all that have this fault, `row` being the first: they can be left out (`data.bad_rows=skip`).
    """

    def __init__(self, message: str, row: int | None = None, rows: npt.NDArray[np.bool_] | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.rows = rows
