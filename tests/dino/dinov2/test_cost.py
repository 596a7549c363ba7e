"""What the loss on patches costs: counted by torch on the layers themselves."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_simprune.dino.head import DinoHead
from hf_simprune.evaluation.profile import BackboneSpec, HeadSpec, dinov2_patch_macs
from hf_simprune.models.architectures import build_backbone


def macs(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def test_the_patch_loss_adds_the_rest_of_the_last_block_and_the_patch_head():
    net = build_backbone("dinov2_tiny", 16, 4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    net.set_attn_implementation("eager")
    layer, tokens = net.layers[-1], torch.randn(1, 17, 24)
    whole = macs(lambda: layer(tokens))
    for_cls = macs(lambda: layer(layer(tokens, half="attention", num_queries=1), half="mlp"))
    head = DinoHead(24, 50, 40, 10)
    projected = macs(lambda: head(torch.randn(6, 24)))
    spec = BackboneSpec(24, 2, 96, 4)
    found = dinov2_patch_macs(spec, 16, 6, head=HeadSpec(40, 10, 50))
    assert found == 2 * 4 * (whole - for_cls + projected)
    assert dinov2_patch_macs(spec, 16, 6, 0.5, (1,), HeadSpec(40, 10, 50)) < found
