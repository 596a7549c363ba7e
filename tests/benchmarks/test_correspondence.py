"""Columns of the correspondence benchmark against loops over single patches."""

import _correspondence as c
import torch
from torch.nn import functional as F


GRID, TOKENS = (3, 3), 4
# Of two images: shared tokens, tokens of their own, dropped patches, and a token that stands for no patch.
FIRST = torch.tensor([[0, 0, 1, -1, 1, 2, 2, 2, -1], [0, 1, 2, 3, -1, -1, -1, -1, -1]])
SECOND = torch.tensor([[3, 3, 3, 1, -1, -1, 0, 0, 2], [-1, 2, 2, 2, 0, 0, 1, -1, -1]])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patches_of(groups: torch.Tensor, token: int) -> list[int]:
    return [patch for patch, group in enumerate(groups.tolist()) if group == token]


def naive_pair(image: int, a: int, b: int, overlaps: torch.Tensor) -> float:
    pairs = [overlaps[image, p, q].item() for p in patches_of(FIRST[image], a) for q in patches_of(SECOND[image], b)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def overlaps() -> torch.Tensor:
    return random(2, 9, 9) > 0


def test_a_token_is_spread_evenly_over_its_patches():
    for groups in (FIRST, SECOND):
        weights = c.patch_weights(groups, TOKENS)
        for image in range(2):
            for patch in range(9):
                group = groups[image, patch].item()
                expected = 0 if group < 0 else 1 / len(patches_of(groups[image], group))
                assert weights[image, patch].item() == expected
        present = torch.tensor([len(set(row) - {-1}) for row in groups.tolist()]).double()
        torch.testing.assert_close(weights.sum(1), present)


def test_overlap_of_matches_is_a_mean_over_patch_pairs():
    members = c.members(FIRST, TOKENS), c.members(SECOND, TOKENS)
    pairs = c.pair_overlap(*members, overlaps())
    counted, candidates = (m.sum(-1) > 0 for m in members)
    assert not counted[0, 3] and candidates[0, 3]
    a, b = random(2, TOKENS, 5, seed=1), random(2, TOKENS, 5, seed=2)
    b[1, 3] = a[1, 0]  # the most similar token of all stands for no patch
    match = c.match_by_cosine(a, b, candidates)
    by_match, by_chance = (
        c.overlap_of_matches(pairs, match, counted),
        c.overlap_by_chance(pairs, counted, candidates),
    )
    for image in range(2):
        tokens = [t for t in range(TOKENS) if patches_of(FIRST[image], t)]
        others = [t for t in range(TOKENS) if patches_of(SECOND[image], t)]
        found, chance = [], []
        for token in tokens:
            cosines = {o: F.cosine_similarity(a[image, token], b[image, o], dim=0).item() for o in others}
            found.append(naive_pair(image, token, max(cosines, key=cosines.get), overlaps()))
            chance += [naive_pair(image, token, other, overlaps()) for other in others]
        assert abs(by_match[image].item() - sum(found) / len(found)) < 1e-9
        assert abs(by_chance[image].item() - sum(chance) / len(chance)) < 1e-9


def test_match_by_position_takes_the_nearest_middle():
    members = c.members(FIRST, TOKENS), c.members(SECOND, TOKENS)
    match = c.match_by_position(*members, GRID)

    def middle(groups: torch.Tensor, token: int) -> tuple[float, float]:
        patches = patches_of(groups, token)
        return sum(p // 3 for p in patches) / len(patches), sum(p % 3 for p in patches) / len(patches)

    for image in range(2):
        others = [t for t in range(TOKENS) if patches_of(SECOND[image], t)]
        for token in range(TOKENS):
            if not patches_of(FIRST[image], token):
                continue
            row, column = middle(FIRST[image], token)
            distances = {}
            for other in others:
                y, x = middle(SECOND[image], other)
                distances[other] = round((row - y) ** 2 + (column - x) ** 2, 6)
            assert match[image, token].item() == min(distances, key=distances.get)


def test_unmerged_tokens_match_their_own_place():
    members = c.members(torch.arange(9).repeat(2, 1), 9)
    assert torch.equal(c.match_by_position(members, members, GRID), torch.arange(9).repeat(2, 1))


def test_cls_margin_leaves_the_image_itself_out_of_the_others():
    first, second = random(4, 6, seed=3), random(4, 6, seed=4)
    margin = c.cls_margin(first, second)
    for image in range(4):
        own = F.cosine_similarity(first[image], second[image], dim=0).item()
        others = [F.cosine_similarity(first[image], second[i], dim=0).item() for i in range(4) if i != image]
        assert abs(margin[image].item() - (own - sum(others) / 3)) < 1e-6
