# SPDX-License-Identifier: Apache-2.0
"""What can be said about DINOv2's options before data and network are loaded. Every complaint is an `InputError`."""

from dataclasses import fields

from ...errors import InputError
from ..arguments import DinoArguments, Dinov2Arguments
from ..geometry import Geometry
from .masking import BlockMasking, check_mask_ratios


OBJECTIVES = ("dino", "dinov2")


def check_objective(args: DinoArguments, sizes: Geometry) -> None:
    """Check the objective's options against each other and against the sizes of the run.

    Raises:
        InputError: an unknown choice, a mask ratio outside [0, 1), an option of DINOv2 without it, a token reduction
            that merges tokens, more masked patches than `--masked_policy keep` has places for, no loss at all, a
            batch too small for KoLeo.
    """
    from ...reduction.masked_pairs import validate_masked_policy
    from .branch import check_masked_reduction
    from .objective import check_centering

    if args.objective not in OBJECTIVES:
        raise InputError(f"--objective {args.objective} is unknown: choose one of {', '.join(OBJECTIVES)}")
    if args.objective == "dino":
        _refuse_options(args)
        return
    check_centering(args.centering)
    validate_masked_policy(args.masked_policy)
    check_masked_reduction(args.token_reduction)
    _check_masked_policy(args, sizes)
    if not any((args.dino_loss_weight, args.ibot_loss_weight, args.koleo_loss_weight)):
        raise InputError(
            "--dino_loss_weight 0, --ibot_loss_weight 0, --koleo_loss_weight 0: nothing is left to train on; give one "
            "of them above 0"
        )
    if args.koleo_loss_weight > 0 and args.per_device_train_batch_size < 2:
        raise InputError(
            f"--per_device_train_batch_size {args.per_device_train_batch_size}: KoLeo compares the images of a batch: "
            "use at least 2, or --koleo_loss_weight 0"
        )


def block_masking(args: DinoArguments, sizes: Geometry) -> BlockMasking | None:
    """How the global views are masked, `None` without DINOv2.

    Raises:
        InputError: a mask ratio outside [0, 1), or the smaller one above the larger one.
    """
    if args.objective != "dinov2":
        return None
    check_mask_ratios(args.mask_ratio_min, args.mask_ratio_max)
    side = sizes.global_crop_size // sizes.patch_size
    return BlockMasking((side, side), args.mask_ratio_min, args.mask_ratio_max, args.mask_probability)


def _refuse_options(args: DinoArguments) -> None:
    """No option of DINOv2 may be given in vain."""
    for option in fields(Dinov2Arguments):
        value = vars(args)[option.name]
        if value != option.default:
            raise InputError(f"--{option.name} {value}: it belongs to --objective dinov2; leave it out")


def _check_masked_policy(args: DinoArguments, sizes: Geometry) -> None:
    masking = block_masking(args, sizes)
    if args.masked_policy != "keep":
        return
    if args.token_reduction != "simprune":
        raise InputError(
            f"--masked_policy keep: it belongs to --token_reduction simprune, not to {args.token_reduction}"
        )
    patches, places = sizes.global_counts[0], sizes.global_counts[-1]
    assert masking is not None  # this objective masks
    if masking.most_masked > places:
        raise InputError(
            f"--masked_policy keep: --mask_ratio_max {args.mask_ratio_max:g} masks up to {masking.most_masked} of "
            f"{patches} patches and the last stage keeps {places}: use at most --mask_ratio_max "
            f"{int(100 * places / patches) / 100:g}, a larger --keep_rate, or --masked_policy pair"
        )
