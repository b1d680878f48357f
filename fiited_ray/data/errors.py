"""What is raised for data that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names file, column, row or position, and what to do.

    row: which row of the table at hand, where it is one row's fault: readers turn it into a row of a file.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
