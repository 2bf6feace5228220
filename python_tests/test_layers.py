"""Which layers a model has, where it lies inside of other modules or its layers lie in stages."""

import pytest
from bottlenecks import llama
from models import base_model
from torch import nn

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.integrations.blocks import sites_of


@pytest.mark.parametrize(("name", "changes", "count"), [
    ("llama", {"num_hidden_layers": 1}, 1), ("llama", {}, 2), ("bert", {}, 2), ("gpt2", {}, 2), ("t5", {}, 2),
    ("bart", {}, 2),
])  # fmt: skip
def test_layers_of_a_model_inside_of_others(name, changes, count):
    plain = base_model(name, **changes)
    expected = [(site.name, site.layer, site.layer_name) for site in sites_of(plain)]
    assert len({layer for _, layer, _ in expected}) == count
    for wrapped in (nn.Sequential(nn.Identity(), plain), nn.ModuleList([nn.ModuleList([nn.Identity(), plain])])):
        wrapped.config = plain.config
        start = next(key for key, module in wrapped.named_modules() if module is plain)
        found = [(site.name, site.layer, site.layer_name) for site in sites_of(wrapped)]
        assert found == [(f"{start}.{block}", layer, f"{start}.{name}") for block, layer, name in expected]
        assert peft_kernels.train_top_layers(wrapped, 1) == (f"{start}.{expected[-1][2]}",)


def test_layers_in_stages():
    model = llama(num_hidden_layers=4)
    layers = model.model.layers
    model.model.layers = nn.Sequential(nn.Sequential(layers[0], layers[1]), nn.Sequential(layers[2], layers[3]))
    assert [site.layer for site in sites_of(model)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(peft_kernels.attach(model, BottleneckConfig(r=2, layers=[1, 2]))) == 2
    peft_kernels.set_active(model, "default", skip_layers=[3])
