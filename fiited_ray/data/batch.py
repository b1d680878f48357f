"""One batch as the model sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fiited_ray.data.errors import DataError


@dataclass(frozen=True)
class Batch:
    """B rows, C dense columns, F features, N ids.

        ids      [ f0,b0  f0,b0 | f0,b1 | f1,b0 |       | ... ]      feature by feature, row by row
        offsets  [ 0              2       3       4       4 ... ]    bag (f, b) begins at offsets[f*B+b]

    Fields:
        dense: float32 [B, C]
        labels: float32 [B], 0 or 1
        ids: int64 [N]
        offsets: int64 [F*B+1]
        weights: float32 [N], or None where every id weighs 1
        skipped: rows that were left out of it (`data.bad_rows=skip`)
    """

    dense: Tensor
    labels: Tensor
    ids: Tensor
    offsets: Tensor
    weights: Tensor | None = None
    skipped: int = 0

    @property
    def rows(self) -> int:
        return len(self.labels)

    def split(self, ends: Sequence[int], features: int) -> Iterator[Batch]:
        """Its rows up to ends[0], from there up to ends[1], and so on, each as a batch; dense and labels are views of this one's."""
        rows = self.rows
        bags = self.offsets[:-1].view(features, rows)
        cuts = torch.tensor([0, *ends])[:, None] + rows * torch.arange(features)
        edges = self.offsets[cuts]  # [parts+1, F]: where the ids of each part's features begin
        places = edges.tolist()
        for part, (begin, end) in enumerate(pairwise([0, *ends])):
            lengths = edges[part + 1] - edges[part]
            offsets = torch.empty(features * (end - begin) + 1, dtype=torch.int64)
            moved = lengths.cumsum(0) - lengths - edges[part]
            torch.add(bags[:, begin:end], moved[:, None], out=offsets[:-1].view(features, end - begin))
            offsets[-1] = lengths.sum()
            spans = [slice(*span) for span in zip(places[part], places[part + 1], strict=True)]
            ids = torch.cat([self.ids[span] for span in spans])
            weights = None if self.weights is None else torch.cat([self.weights[span] for span in spans])
            yield Batch(self.dense[begin:end], self.labels[begin:end], ids, offsets, weights)

    def to(self, device: torch.device) -> Batch:
        """The batch in a device's memory."""
        names = ("dense", "labels", "ids", "offsets") if self.weights is None else ("dense", "labels", "ids", "offsets", "weights")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def validate(self, features: Sequence[str], dense: Sequence[str] = ()) -> None:
        """Check every promise of this class.

        Raises:
            DataError: naming the feature or column and the position of what is wrong.
        """
        rows = self.rows
        self._check_shapes(len(features), rows)
        lengths = torch.diff(self.offsets)
        if len(lengths) and int(lengths.min()) < 0:
            at = int((lengths < 0).nonzero()[0])
            feature = features[at // rows]
            raise DataError(
                f"feature {feature!r}, row {at % rows} of the batch: its offsets fall from {self.offsets[at]} to {self.offsets[at + 1]}"
            )
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != len(self.ids):
            raise DataError(
                f"offsets go from {self.offsets[0]} to {self.offsets[-1]}; they must go from 0 to the number of ids, {len(self.ids)}"
            )
        # a sum that is finite has finite terms, and takes a twentieth of the time of asking each
        if not math.isfinite(float(self.dense.sum())) and not bool((finite := torch.isfinite(self.dense)).all()):
            row, column = (~finite).nonzero()[0].tolist()
            name = repr(dense[column]) if column < len(dense) else str(column)
            raise DataError(
                f"dense column {name}, row {row} of the batch: {self.dense[row, column]}; "
                "clean the data, or leave the value null if it is missing"
            )
        if self.weights is not None and not bool(torch.isfinite(self.weights).all()):
            lookup = int((~torch.isfinite(self.weights)).nonzero()[0])
            at = int(torch.searchsorted(self.offsets, lookup, right=True)) - 1
            raise DataError(
                f"feature {features[at // rows]!r}, row {at % rows} of the batch: the weight of an id is {self.weights[lookup]}"
            )
        if not torch.equal(self.labels, (self.labels > 0).float()):
            row = int(((self.labels != 0) & (self.labels != 1)).nonzero()[0])
            raise DataError(f"label of row {row} of the batch is {self.labels[row]}; labels are 0 or 1")

    def _check_shapes(self, features: int, rows: int) -> None:
        wanted = {"dense": torch.float32, "labels": torch.float32, "ids": torch.int64, "offsets": torch.int64}
        for name, dtype in wanted.items():
            if getattr(self, name).dtype != dtype:
                raise DataError(f"batch.{name} is {getattr(self, name).dtype}; {dtype} is wanted")
        if self.dense.dim() != 2 or len(self.dense) != rows:
            raise DataError(f"batch.dense has shape {tuple(self.dense.shape)} for {rows} labels")
        if len(self.offsets) != features * rows + 1:
            raise DataError(
                f"batch.offsets has {len(self.offsets)} entries; {features} features x {rows} rows + 1 = {features * rows + 1} are wanted"
            )
        if self.weights is not None and self.weights.dtype != torch.float32:
            raise DataError(f"batch.weights is {self.weights.dtype}; {torch.float32} is wanted")
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise DataError(f"batch.weights has {len(self.weights)} entries for {len(self.ids)} ids")
