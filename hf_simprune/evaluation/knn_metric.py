# SPDX-License-Identifier: Apache-2.0
"""The weighted k-NN accuracy as an `evaluate.Metric`: imported, not loaded, so it works offline."""

import datasets
import evaluate
import torch
from torch import Tensor

from .knn import TEMPERATURE, K, knn_accuracy


_DESCRIPTION = "Accuracy of DINO's weighted k-nearest-neighbour classifier on frozen features."
_INPUTS = """
Args:
    predictions: features of the test images, a list of rows of the same width.
    references: their integer labels.
    bank: (M, D) tensor, features of the labelled images.
    bank_labels: (M,) tensor, their labels.
    k: number of neighbours.
    temperature: of the vote's weights.
Returns:
    knn_accuracy: fraction of the test images classified correctly.
"""
_CITATION = """@inproceedings{caron2021emerging,
  title={Emerging Properties in Self-Supervised Vision Transformers},
  author={Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and Mairal, Julien
          and Bojanowski, Piotr and Joulin, Armand},
  booktitle={ICCV},
  year={2021}
}"""


class KNNAccuracy(evaluate.Metric):
    """Weighted k-NN accuracy; call `add_batch(predictions=features, references=labels)` and then `compute`.

    Example:

    ```python
    metric = KNNAccuracy()
    metric.add_batch(predictions=test_features, references=test_labels)
    metric.compute(bank=train_features, bank_labels=train_labels)  # {"knn_accuracy": ...}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[int],
        bank: Tensor,
        bank_labels: Tensor,
        k: int = K,
        temperature: float = TEMPERATURE,
    ) -> dict[str, float]:
        queries, labels = torch.tensor(predictions), torch.tensor(references)
        return {"knn_accuracy": knn_accuracy(bank.cpu(), bank_labels.cpu(), queries, labels, k, temperature)}
