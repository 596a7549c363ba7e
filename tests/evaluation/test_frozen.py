"""k-NN and linear probe of whole networks: against plain transformers and scikit-learn."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.neighbors import KNeighborsClassifier

from hf_simprune import evaluate_knn, evaluate_linear
from hf_simprune.errors import InputError
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.evaluation.outputs import Network
from hf_simprune.models import SimPruneViTConfig, SimPruneViTForImageClassification

from ..rba.tiny_compression import IMAGE_SIZE, SIZES, dinov2, vit


PROCESSOR = build_image_processor(IMAGE_SIZE, [0.5] * 3, [0.25] * 3)
CLASSES = 3


def pictures(count, seed):
    """Noise with a colour of its own for each class, faint enough that some are mistaken."""
    rng = np.random.default_rng(seed)
    labels = [i % CLASSES for i in range(count)]
    tints = 20 * np.eye(3)
    images = [np.clip(rng.integers(0, 230, (24, 24, 3)) + tints[label], 0, 255).astype(np.uint8) for label in labels]
    return images, labels


TRAIN, TEST = pictures(45, 0), pictures(30, 1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return vit(depth=2).eval()


def reference_features(model, images):
    with torch.no_grad():
        pixels = PROCESSOR(images=[PILImage.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
        return model.base_model(pixels).last_hidden_state[:, 0].numpy()


def test_knn_agrees_with_scikit_learn(network):
    found = evaluate_knn(network, TRAIN, TEST, processor=PROCESSOR, k=7, temperature=0.1, batch_size=8, progress=False)
    train, test = (reference_features(network, images) for images, _ in (TRAIN, TEST))
    judge = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1))
    expected = judge.fit(train, TRAIN[1]).predict(test)
    assert found.predictions.tolist() == expected.tolist()
    assert found.accuracy == np.mean(expected == TEST[1]) and found.hits.tolist() == list(expected == TEST[1])
    assert found.interval[0] < found.accuracy < found.interval[1] and found.train_images == 45
    assert found.settings == {"k": 7, "temperature": 0.1}


def test_a_linear_head_is_that_of_scikit_learn(network):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    found = evaluate_linear(network, TRAIN, TEST, processor=PROCESSOR, l2_grid=[0.1], progress=False)
    train, test = (reference_features(network, images) for images, _ in (TRAIN, TEST))
    scaler = StandardScaler().fit(train)
    judge = LogisticRegression(C=1 / (0.1 * len(train)), tol=1e-8, max_iter=2000)
    judge.fit(scaler.transform(train), TRAIN[1])
    assert (found.predictions.numpy() == judge.predict(scaler.transform(test))).mean() > 0.95
    assert found.accuracy == pytest.approx(np.mean(found.predictions.numpy() == TEST[1]))


def test_a_data_set_gives_what_lists_give(network, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(CLASSES)})
    sets = [
        Dataset.from_dict({"image": [PILImage.fromarray(i) for i in images], "label": labels}, features=features)
        for images, labels in (TRAIN, TEST)
    ]
    from_lists = evaluate_knn(network, TRAIN, TEST, processor=PROCESSOR, progress=False)
    network.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path).eval()  # which knows where its processor is
    found = evaluate_knn(loaded, *sets, progress=False)
    assert torch.equal(found.predictions, from_lists.predictions)


def test_tokens_that_are_reduced_are_no_obstacle(network):
    """At keep rate 1 the network that reduces tokens is the one that does not."""
    config = {**SIZES, "num_hidden_layers": 2, "num_labels": 4, "layer_norm_eps": network.config.layer_norm_eps}
    outputs = []
    for keep_rate in (1.0, 0.5):
        own = SimPruneViTForImageClassification(
            SimPruneViTConfig(**config, token_reduction="evit", keep_rate=keep_rate, reduction_layers=[0])
        ).eval()
        own.load_state_dict(network.state_dict())
        pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
        outputs.append(Network(own).outputs(pixels))
        with torch.no_grad():
            torch.testing.assert_close(outputs[-1].logits, own(pixels).logits)
    plain = Network(network).outputs(pixels)
    torch.testing.assert_close(outputs[0].features, plain.features)
    torch.testing.assert_close(outputs[0].logits, plain.logits)
    assert not torch.allclose(outputs[1].features, plain.features)


def test_a_backbone_has_no_logits():
    backbone = Network(dinov2().eval())
    found = backbone.outputs(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert found.logits is None and not backbone.has_head and found.features.shape == (2, 16)


def test_mistakes_are_named(network):
    with pytest.raises(InputError, match="45 images with 44 labels"):
        evaluate_knn(network, (TRAIN[0], TRAIN[1][:-1]), TEST, processor=PROCESSOR, progress=False)
    with pytest.raises(InputError, match="knn_k=50"):
        evaluate_knn(network, TRAIN, TEST, processor=PROCESSOR, k=50, progress=False)
    with pytest.raises(InputError, match="processor: none given and none found"):
        evaluate_knn(network, TRAIN, TEST, progress=False)
    with pytest.raises(InputError, match="one class only"):
        evaluate_linear(network, (TRAIN[0], [1] * 45), TEST, processor=PROCESSOR, progress=False)
