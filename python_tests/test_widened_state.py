"""A widened model: its memory and state dict, the changes and copies that it follows, and that unwiden undoes it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from widened_models import MODELS, adapted, assert_unchanged, blocks, logits, plain, snapshot, trained

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.modules import BottleneckAdapter

# -- memory, state, and back ------------------------------------------------------------------------------------------


def memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_memory_grows_by_the_adapters_units_only(name):
    model = adapted(name)
    before = memory(model)
    peft_kernels.widen(model)
    grown = 0
    for block in blocks(model):
        *ups, down = block.projections
        wide = ups[0].wide_weight
        for projection in ups:
            assert projection.weight.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
        assert down.weight.data_ptr() == down.wide_weight.data_ptr()
        biases = ups[0].wide_bias.numel() + down.wide_bias.numel()
        biases -= sum(p.bias.numel() for p in ups if p.bias is not None)
        grown += 4 * (8 * wide.shape[1] + 8 * down.wide_weight.shape[0] + biases)
    assert memory(model) - before == grown
    peft_kernels.unwiden(model)
    assert memory(model) == before


def test_memory_of_a_folded_block():
    model = adapted(config=BottleneckConfig.pfeiffer(r=8))
    before = memory(model)
    peft_kernels.widen(model, serial=True)
    hidden, units, inner = model.config.hidden_size, 8, model.config.intermediate_size
    assert memory(model) - before == 2 * 4 * (units * inner + hidden * units + hidden + units)


@pytest.mark.parametrize("serial", [False, True], ids=["parallel", "serial"])
@pytest.mark.parametrize("name", MODELS)
def test_unwiden_gives_everything_back(name, serial):
    model = adapted(name, BottleneckConfig.houlsby(r=4) if serial else None)
    before, expected = snapshot(model), logits(model)
    peft_kernels.widen(model, serial=serial)
    logits(model)
    peft_kernels.unwiden(model)
    assert_unchanged(model, before)
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(logits(model)["logits"], expected["logits"])
    peft_kernels.unwiden(model)  # nothing to do
    assert not any("wide" in key for m in model.modules() for key in (*m.__dict__, *m._buffers))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_state_dict_and_the_files_are_those_of_the_model(name, tmp_path):
    model = adapted(name)
    before = snapshot(model)[0]
    base = plain(name)
    peft_kernels.widen(model)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[key], t) for key, t in before.items())
    model.save_pretrained(tmp_path / "model")
    loaded = type(base).from_pretrained(tmp_path / "model")
    assert all(torch.equal(t, before[key]) for key, t in loaded.state_dict().items())
    peft_kernels.save_pretrained(model, tmp_path / "adapter")
    peft_kernels.load(base, tmp_path / "adapter")
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert all(torch.equal(t, before[key]) for key, t in torch.load(tmp_path / "state.pt").items())


# -- never silently wrong ---------------------------------------------------------------------------------------------


CASES = {
    "parallel": lambda: (adapted(), False),
    "conv1d": lambda: (adapted("gpt2", activation="tanh"), False),
    "beside": lambda: (adapted("bert"), False),
    "serial": lambda: (adapted(config=BottleneckConfig.houlsby(r=4)), True),
}


def whole_state(model):
    model.load_state_dict(trained(copy.deepcopy(model), seed=5).state_dict())


def assigned_state(model):
    other = {key: t + 1 / 64 for key, t in trained(copy.deepcopy(model), seed=5).state_dict().items()}
    model.load_state_dict(other, assign=True)


def changed_base(model):
    model.load_state_dict({key: t + 1 / 64 for key, t in model.state_dict().items()})


def adapters_state(model):
    state = {key: t * 2 for key, t in model.state_dict().items() if ".bottleneck." in key}
    model.load_state_dict(state, strict=False)


def one_adapter(model):
    for module in model.modules():
        if isinstance(module, BottleneckAdapter):
            module.load_state_dict({key: t * 2 for key, t in module.state_dict().items()})


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def scaling(model):
    for module in model.modules():
        if isinstance(module, BottleneckAdapter):
            module.scaling = -3.0


def each_part_alone(model):
    for module in list(model.modules()):
        if not module._modules:
            module.double()


CHANGES = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "cpu": lambda model: model.cpu(),
    "leaves": each_part_alone,
    "state": whole_state,
    "assign": assigned_state,
    "base": changed_base,
    "adapters": adapters_state,
    "adapter": one_adapter,
    "in_place": in_place,
    "scaling": scaling,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_a_change_of_a_widened_model_is_followed(case, change):
    """The same as that change of the plain model, and widening after it, bit for bit."""
    model, serial = CASES[case]()
    widened = copy.deepcopy(model)
    peft_kernels.widen(widened, serial=serial)
    CHANGES[change](model)
    CHANGES[change](widened)
    found = logits(widened)
    after = copy.deepcopy(model)
    peft_kernels.widen(after, serial=serial)
    assert torch.equal(found["logits"], logits(after)["logits"])
    for block in blocks(widened):  # no second copy
        down = block.projections[-1]
        assert down.weight.data_ptr() == down.wide_weight.data_ptr()
    peft_kernels.unwiden(widened)
    assert torch.equal(logits(widened)["logits"], logits(model)["logits"])


@pytest.mark.parametrize("change", ["to", "state", "assign", "base"])
@pytest.mark.parametrize("case", CASES)
def test_a_change_is_followed_without_a_call(case, change):
    """What a compiled model needs, in whose graph nothing looks for changes."""
    model, serial = CASES[case]()
    peft_kernels.widen(model, serial=serial)
    CHANGES[change](model)
    assert all(block._unchanged() for block in blocks(model))


@pytest.mark.parametrize("case", CASES)
def test_copies_are_independent(case):
    model, serial = CASES[case]()
    peft_kernels.widen(model, serial=serial)
    expected = logits(model)["logits"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied)["logits"], expected)
        theirs = {t.untyped_storage().data_ptr() for t in (*copied.parameters(), *copied.buffers())}
        assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()))
        assert memory(copied) == memory(model)
        in_place(copied)
        assert not torch.equal(logits(copied)["logits"], expected)
        assert torch.equal(logits(model)["logits"], expected)
        peft_kernels.unwiden(copied)


def test_widened_in_inference_mode():
    model = adapted()
    expected = logits(model)
    with torch.inference_mode():
        peft_kernels.widen(model)
        torch.testing.assert_close(logits(model), expected)
    whole_state(model)
    found = logits(model)
    peft_kernels.unwiden(model)
    torch.testing.assert_close(found, logits(model))


def test_what_was_trained_is_trained_again_whatever_was_loaded():
    model = adapted()
    before = snapshot(model)
    peft_kernels.widen(model)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    peft_kernels.unwiden(model)
    assert_unchanged(model, before)


def test_a_copy_follows_before_its_first_call():
    model = adapted()
    peft_kernels.widen(model)
    copied = copy.deepcopy(model)
    whole_state(copied)
    whole_state(model)
    assert torch.equal(logits(copied)["logits"], logits(model)["logits"])
