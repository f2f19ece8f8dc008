"""A data set for the Trainer."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from tests.support.tiny import tokens


class Rows(Dataset):  # type: ignore[type-arg]
    """Sixteen rows, of which the first tokens are a prompt that does not count."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = tokens(1, 12, seed=place)[0]
        labels = ids.clone()
        labels[: place % 7] = -100
        return {"input_ids": ids, "labels": labels}
