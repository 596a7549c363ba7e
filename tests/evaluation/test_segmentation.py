"""Linear segmentation on patch tokens: mIoU against a naive loop, training, odd sizes."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTModel

from hf_simprune.errors import InputError
from hf_simprune.evaluation.segmentation import (
    LinearSegmenter,
    class_iou,
    confusion_matrix,
    evaluate_segmentation,
    fit_segmenter,
    miou_difference,
    patch_tokens,
    whole_patches,
)
from hf_simprune.rba.adapters import adapter_for


CLASSES, IGNORE, GRID, SIZE = 4, 9, (3, 5), (30, 41)


def naive_miou(predicted, masks, classes, ignore):
    values = []
    for c in range(classes):
        intersection = union = 0
        for given, mask in zip(predicted, masks):
            for p, t in zip(given.flatten().tolist(), mask.flatten().tolist()):
                if t == ignore:
                    continue
                intersection += p == c and t == c
                union += p == c or t == c
        if union:
            values.append(intersection / union)
    return sum(values) / len(values)


def scenes(images, seed, noise=0.5):
    """Tokens that say the class of their patch, and masks enlarged from it, with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (images, *GRID), generator=generator)
    codes = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(50))
    tokens = codes[classes.flatten(1)] + noise * torch.randn(images, GRID[0] * GRID[1], 8, generator=generator)
    masks = F.interpolate(classes[:, None].float(), SIZE, mode="nearest")[:, 0].to(torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < 0.05] = IGNORE
    return tokens, masks


def test_miou_is_that_of_a_naive_loop_at_full_size():
    tokens, masks = scenes(6, 0)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, CLASSES, generator=generator)
    segmenter = LinearSegmenter(torch.zeros(8), torch.ones(8), weight, torch.zeros(CLASSES), GRID)
    result = evaluate_segmentation(segmenter, tokens, masks, IGNORE)
    scores = (tokens @ weight).transpose(1, 2).reshape(6, CLASSES, *GRID)
    predicted = F.interpolate(scores, SIZE, mode="bilinear").argmax(1)
    assert result.miou == pytest.approx(naive_miou(predicted, masks, CLASSES, IGNORE), abs=1e-12)
    assert result.confusion.sum() == (masks != IGNORE).sum()
    assert result.interval[0] < result.miou < result.interval[1]


def test_a_class_that_never_occurs_is_left_out():
    mask, predicted = torch.tensor([[0, 0, 1, IGNORE]]), torch.tensor([[0, 1, 1, 3]])
    iou = class_iou(confusion_matrix(predicted, mask, CLASSES, IGNORE))
    assert iou[:2].tolist() == [0.5, 0.5]
    assert iou[2:].isnan().all()
    assert iou.nanmean().item() == naive_miou([predicted], [mask], CLASSES, IGNORE)


def test_training_finds_the_classes_in_the_tokens():
    tokens, masks = scenes(40, 0)
    test_tokens, test_masks = scenes(20, 1)
    trained = fit_segmenter(tokens, masks, GRID, CLASSES, IGNORE, steps=150, stride=1)
    result = evaluate_segmentation(trained, test_tokens, test_masks, IGNORE)
    patches = F.interpolate(test_masks[:, None].float(), GRID, mode="nearest-exact")[:, 0]
    known = patches != IGNORE
    assert (trained.predict(test_tokens, GRID) == patches)[known].float().mean() > 0.9
    shuffled = evaluate_segmentation(trained, test_tokens[torch.randperm(20)], test_masks, IGNORE)
    assert result.miou > shuffled.miou + 0.3


def test_the_same_seed_gives_the_same_layer():
    tokens, masks = scenes(40, 0)
    first, second, other = (
        fit_segmenter(tokens, masks, GRID, CLASSES, IGNORE, steps=5, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_a_noisier_network_is_worse_by_a_paired_interval():
    results = []
    for noise in (0.3, 2.0):
        tokens, masks = scenes(40, 0, noise)
        test_tokens, test_masks = scenes(20, 1, noise)
        trained = fit_segmenter(tokens, masks, GRID, CLASSES, IGNORE, steps=100)
        # the noise is another, the scenes are the same
        results.append(evaluate_segmentation(trained, test_tokens, test_masks, IGNORE))
    difference, low, high = miou_difference(results[1], results[0])
    assert difference == pytest.approx(results[1].miou - results[0].miou)
    assert low < difference < high < 0
    assert miou_difference(results[0], results[0]) == (0.0, 0.0, 0.0)


def test_images_of_another_shape_than_the_network_was_made_for():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=32, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    adapter = adapter_for(model)

    def dense(pixels):
        hidden, context = adapter.embed(pixels)
        for block in range(adapter.depth):
            hidden = adapter.block(block, hidden, context)
        return adapter.dense(hidden)

    size = whole_patches(45, 60, (8, 8))
    assert size == (48, 64)
    pixels = torch.randn(3, 3, *size)
    tokens = patch_tokens(dense, pixels.split(2))
    expected = model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    torch.testing.assert_close(tokens, expected.detach(), atol=1e-5, rtol=1e-5)
    masks = torch.randint(CLASSES, (3, 45, 60))
    trained = fit_segmenter(tokens, masks, (6, 8), CLASSES, steps=2)
    assert trained.predict(tokens, (45, 60)).shape == (3, 45, 60)


@pytest.mark.parametrize(
    ("grid", "mask_class", "message"),
    [((3, 4), 0, "on a grid of"), (GRID, 4, "classes 4 to 4; 0 to 3"), (GRID, IGNORE, "every pixel")],
)
def test_bad_input_is_named(grid, mask_class, message):
    tokens, masks = scenes(2, 0)
    with pytest.raises(InputError, match=message):
        fit_segmenter(tokens, torch.full_like(masks, mask_class), grid, CLASSES, IGNORE)
