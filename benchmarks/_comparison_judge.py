# SPDX-License-Identifier: Apache-2.0
"""What a comparison measures of each network: which held-out images k-NN and a linear head classify correctly."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging

from hf_simprune.data.decoding import decode_image
from hf_simprune.data.loading import encoded_bytes, find_image_column, find_label_column, image_rows, load_split
from hf_simprune.errors import InputError
from hf_simprune.evaluation.features import extract_features, raw_pixel_features
from hf_simprune.evaluation.knn import K, knn_predict
from hf_simprune.evaluation.linear_probe import probe_features


MEASURES = {"knn_cls": "k-NN, CLS", "knn_patch_mean": "k-NN, patch mean", "probe_cls": "linear probe, CLS"}
Hits = dict[str, np.ndarray]


class Judge:
    """Hits on the test images, one boolean an image, by measure; what was found is kept in `folder`.

    Raises InputError where a file has no labels or too few training images for the k-NN.
    """

    def __init__(self, train: Path, test: Path, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        digest = hashlib.sha256()
        self.images: list[list[Image.Image]] = []
        self.labels: list[Tensor] = []
        for path in (train, test):
            rows = load_split(str(path), "train")
            image, label = find_image_column(rows), find_label_column(rows.features)
            if label is None:
                raise InputError(f"{path}: it has no column of labels, which the comparison needs")
            cells = image_rows(rows, image)
            encoded = [encoded_bytes(cell[image]) for cell in cells]
            self.images.append([Image.fromarray(decode_image(cell).numpy()) for cell in encoded])
            self.labels.append(torch.tensor(rows[label][:]))
            digest.update(b"".join(encoded) + self.labels[-1].numpy().tobytes())
        self.data = digest.hexdigest()
        if len(self.labels[0]) < K:
            raise InputError(f"{train}: {len(self.labels[0])} images; the k-NN needs {K} at least")

    @property
    def test_images(self) -> int:
        return len(self.labels[1])

    def network(self, name: str, folder: Path, processor_folder: Path) -> Hits:
        """Of any folder that `AutoModel` loads; `name` is what it is kept under."""
        return self._kept(name, lambda: self._network(folder, processor_folder))

    def pixels(self, processor_folder: Path) -> Hits:
        """Of the pixels that the networks see, flattened: the baseline for all measures."""
        return self._kept("raw-pixels", lambda: self._pixels(processor_folder))

    def _network(self, folder: Path, processor_folder: Path) -> Hits:
        logging.disable_progress_bar()
        processor = AutoImageProcessor.from_pretrained(processor_folder, backend="pil")
        network = AutoModel.from_pretrained(folder).to(self.device)
        bank, queries = (extract_features(network, images, processor, 256, progress=False) for images in self.images)
        return {
            "knn_cls": self._knn(bank["cls"], queries["cls"]),
            "knn_patch_mean": self._knn(bank["patch_mean"], queries["patch_mean"]),
            "probe_cls": self._probe(bank["cls"], queries["cls"]),
        }

    def _pixels(self, processor_folder: Path) -> Hits:
        processor = AutoImageProcessor.from_pretrained(processor_folder, backend="pil")
        bank, queries = (raw_pixel_features(images, processor) for images in self.images)
        knn = self._knn(bank, queries)
        return {"knn_cls": knn, "knn_patch_mean": knn, "probe_cls": self._probe(bank, queries)}

    def _knn(self, bank: Tensor, queries: Tensor) -> np.ndarray:
        bank, queries = bank.to(self.device), queries.to(self.device)
        return (knn_predict(bank, self.labels[0], queries).cpu() == self.labels[1]).numpy()

    def _probe(self, bank: Tensor, queries: Tensor) -> np.ndarray:
        bank, queries = bank.to(self.device), queries.to(self.device)
        return probe_features(bank, self.labels[0].to(self.device), queries, self.labels[1]).hits.numpy()

    def _kept(self, name: str, find: Callable[[], Hits]) -> Hits:
        path = self.folder / f"{name}.npz"
        if path.is_file():
            with np.load(path) as stored:
                if str(stored["data"]) == self.data:
                    return {measure: stored[measure] for measure in MEASURES}
        hits = find()
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, data=self.data, **hits)
        return hits
