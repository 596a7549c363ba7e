# SPDX-License-Identifier: Apache-2.0
"""Which images the page begins with. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ImageSource:
    """A data set to look at.

    Attributes:
        name_or_path: of a data set on the Hub, a parquet file or a folder of images.
        config_name, revision: of a data set on the Hub.
        split: "train" if left out.
        image_column: where several would do.
        token: of the Hub; by default the one stored by `hf auth login`.
    """

    name_or_path: str
    config_name: str | None = None
    revision: str | None = None
    split: str | None = None
    image_column: str | None = None
    token: str | None = None

    def open(self) -> Dataset:
        """The images, read from the disk as they are asked for; no other column.

        Raises:
            InputError: there is no such data set, split or column, or several columns hold images.
        """
        from ..data.loading import find_image_column, load_split

        rows = load_split(
            self.name_or_path,
            self.split or "train",
            config_name=self.config_name,
            revision=self.revision,
            token=self.token,
            split_option="--split",
        )
        return rows.select_columns(find_image_column(rows, self.image_column))
