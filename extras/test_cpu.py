"""What suits a CPU computes the same."""
import sys

import pytest
import torch
from torch import nn

from extras import cpu, quantize
from extras.conftest import ROOT, TINY
from extras.cpu import BF16LinearInFP32, tune_for_cpu
from load_weights import load

sys.path.insert(0, str(ROOT / "reference"))
import small_model as ref                                                                           # noqa: E402

torch.set_grad_enabled(False)


def distance(a, b) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.float() - b.float()).abs().max())


@pytest.fixture
def machine(monkeypatch):
    """machine(capability, bf16) pretends to be such a CPU, and returns the numbers of threads that torch is told from then on."""
    def pretend(capability: str, bf16: bool) -> list[int]:
        threads = []
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(cpu, "has_bf16_products", lambda: bf16)
        monkeypatch.setattr(torch, "set_num_threads", threads.append)
        return threads
    return pretend


@pytest.mark.parametrize("bias", [True, False])
def test_bf16_in_fp32_is_the_same_product(bias):
    x, layer = torch.randn(9, 64, generator=torch.manual_seed(0)).bfloat16(), nn.Linear(64, 32, bias)
    layer = layer.bfloat16()
    tuned, plain, exact = BF16LinearInFP32(layer)(x), layer(x), layer.float()(x.float())
    layer.bfloat16()
    assert tuned.dtype == torch.bfloat16 and distance(tuned, exact) <= distance(plain, exact) + 1e-3
    assert torch.equal(BF16LinearInFP32(layer)(x[:3]), layer(x[:3]))


@pytest.mark.parametrize("name", ref.MODELS)
def test_a_cpu_without_bf16_products_computes_them_in_fp32(machine, tmp_path, name):
    """Where the layers are bf16; and a tied head stays tied."""
    machine("AVX2", bf16=False)
    folder = ref.write_checkpoint(ref.MODELS[name], tmp_path)
    assert not any(isinstance(module, BF16LinearInFP32) for module in tune_for_cpu(load(folder)).modules())
    plain, model = load(folder, dtype=torch.bfloat16), tune_for_cpu(load(folder, dtype=torch.bfloat16))
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert isinstance(model.lm_head, BF16LinearInFP32)
    assert (model.lm_head.weight is model.embed_tokens.weight) == ref.MODELS[name].tie
    assert [*model.state_dict()] == [*plain.state_dict()]
    inputs = model.prepare([3, 20, 21, 22, 33, 7])
    assert distance(model(inputs), plain(inputs)) < 0.05 * plain(inputs).abs().max()


def test_a_cpu_with_bf16_products_keeps_its_layers(machine):
    machine("AVX2", bf16=True)
    layers = [type(module) for module in tune_for_cpu(load(TINY, dtype=torch.bfloat16)).modules()]
    assert nn.Linear in layers and BF16LinearInFP32 not in layers


def stop(*args):
    raise KeyboardInterrupt


def test_with_avx_512_onednn_is_off_while_one_token_goes_through(machine):
    """And on again behind it: also after an error, and at the next pass after an interrupt."""
    onednn = torch._C._get_mkldnn_enabled
    seen, logits = {}, {}
    for capability in ("AVX2", "AVX512"):
        machine(capability, bf16=True)
        model = tune_for_cpu(load(TINY))
        one, two = model.prepare([5]), model.prepare([5, 6])
        model.norm.register_forward_hook(lambda module, given, out: seen.setdefault(capability, []).append(onednn()))
        logits[capability] = [model(one), model(two), model(inputs=one)]
        with pytest.raises(AttributeError):
            model(one._replace(patches=None, grids=[(1, 2, 2)]))
        assert onednn()
        interrupt = model.norm.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(one)
        interrupt.remove()
        model(two)
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            model(two)
            assert not onednn()
        assert onednn()
    assert seen == {"AVX2": [True, True, True, True, True, False], "AVX512": [False, True, False, False, True, False]}
    assert all(distance(one, two) < 1e-5 for one, two in zip(*logits.values()))


@pytest.mark.parametrize("compiled", [True, False])
def test_int4_is_packed_for_the_kernel_of_the_cpu(machine, compiled):
    """But not for a compiler, which reads the weights as they are."""
    machine("AVX2", bf16=True)
    model = tune_for_cpu(load(TINY, stages=[quantize.stage("int4")]), compiled)
    layer, plain = (m.layers[1].self_attn.q_proj for m in (model, load(TINY)))
    x = torch.randn(5, 128, generator=torch.manual_seed(0))
    assert layer.packed != compiled and distance(layer(x), plain(x)) < 0.2 * plain(x).abs().max()


def test_a_small_model_runs_on_one_thread(machine, monkeypatch):
    threads = machine("AVX2", bf16=True)
    tune_for_cpu(load(TINY))
    assert threads == [1]
    monkeypatch.setattr(cpu, "SMALL_MODEL", 1e6)
    tune_for_cpu(load(TINY))
    assert threads == [1]
