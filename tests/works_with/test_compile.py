"""`torch.compile` of compressed models as one graph; every family and block by block: tests/models."""

import shutil
from collections.abc import Callable

import pytest
import torch

from .conftest import Page


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(not shutil.which("g++"), reason="the default backend needs a C++ compiler on a CPU")
def test_the_default_backend_computes_the_same(open_page: Callable[[str], Page], monkeypatch: pytest.MonkeyPatch):
    """For maps and token reduction at once."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # else each of its processes imports torch
    page = open_page("reduced")
    torch.testing.assert_close(page.run("torch.compile")["logits"], page.logits(page.pixels), atol=1e-5, rtol=1e-4)


def test_one_graph_serves_training_too(open_page: Callable[[str], Page], others: torch.Tensor):
    page = open_page("own")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(page.model.train(), backend=backend, fullgraph=True, dynamic=False)
    labels = torch.arange(5) % 4
    compiled(others, labels=labels).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in page.model.named_parameters()}
    page.model.zero_grad()
    page.model(others, labels=labels).loss.backward()
    for name, parameter in page.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    assert len(graphs) == 1
