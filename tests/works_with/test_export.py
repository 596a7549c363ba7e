"""`torch.export` of compressed models, for any batch; every family and method: tests/models."""

import torch

from .conftest import Page


@torch.no_grad()
def test_the_exported_program_computes_the_same_for_another_batch(page: Page, others: torch.Tensor):
    names = page.run("torch.export")
    torch.testing.assert_close(names["logits"], page.logits(page.pixels))
    program = torch.export.load("outputs/model.pt2").module()
    torch.testing.assert_close(program(others).logits, page.logits(others))
