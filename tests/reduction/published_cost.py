# SPDX-License-Identifier: Apache-2.0
"""MACs of DeiT-S at 224 pixels by the formula of the papers, in percent of the network that keeps all tokens."""

GRID, DEPTH, WIDTH = (14, 14), 12, 384


def flop_share(layers, counts):
    """`counts`: patch tokens before the first of the reducing blocks `layers` and after each, as a reducer has them.

    A block has 4nd^2 + 2n^2 d MACs of attention on the tokens that enter it, and 8nd^2 of the MLP on those that leave
    for it; patches are embedded once; [CLS] is always there.
    """
    full = _macs((), [196])
    return 100 * _macs(layers, counts) / full


def _macs(layers, counts):
    total, stage = 196 * 16 * 16 * 3 * WIDTH, 0
    for block in range(DEPTH):
        entering = counts[stage] + 1
        stage += block in layers
        total += 4 * entering * WIDTH**2 + 2 * entering**2 * WIDTH + 8 * (counts[stage] + 1) * WIDTH**2
    return total
