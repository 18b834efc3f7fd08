"""The compiled step computes what the plain model does, and where nothing can be compiled it goes on without."""
import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from ernie_vl import ErnieVL, Experts, InputError, KVCache
from extras import quantize
from extras.compiled import CompiledErnieVL, GroupedExperts, compile_model, open_windows
from extras.conftest import EXAMPLE, ROOT, TINY
from load_weights import load
from tokenizer import Tokenizer, encode_chat, load_image

sys.path.insert(0, str(ROOT / "reference"))
import small_model as ref                                                                           # noqa: E402

torch.set_grad_enabled(False)


def distance(a, b) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.float() - b.float()).abs().max())


@pytest.mark.parametrize("name, dtype", [("28b", torch.float32), ("424b", torch.float32), ("28b", torch.bfloat16)])
def test_grouped_experts_compute_what_single_ones_do(tmp_path, name, dtype):
    plain = load(ref.write_checkpoint(ref.MODELS[name], tmp_path), dtype=dtype).layers[-1].mlp.text_moe
    grouped = GroupedExperts(copy.deepcopy(plain))
    for rows in (1, 2, 40):
        x = torch.randn(rows, plain.gate.weight.shape[1], generator=torch.manual_seed(rows)).to(dtype)
        assert distance(grouped(x), plain(x)) <= (2e-6 if dtype == torch.float32 else 0.02) * plain(x).abs().max()
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    assert grouped.experts[3].up_proj.weight.data_ptr() == grouped.stacks["up_proj"][0][3].data_ptr()      # no second copy


def test_windows_hold_zeros_behind_the_tokens():
    """A buffer of 128 tokens has 256 places by itself, as a window has, and anything in them; NaN would survive the mask."""
    for tokens, window in ((100, 256), (128, 256), (256, 512), (2048, 2560), (5000, 5120)):
        cache, keys = [KVCache(), KVCache()], torch.randn(2, 2, tokens, 4)
        for kv in cache:
            kv.append(keys)
            kv.buffer[:, :, tokens:] = torch.nan
        open_windows(cache, tokens)
        assert all(kv.buffer.shape == (2, 2, window, 4) and kv.length == tokens for kv in cache)
        assert all(torch.equal(kv.buffer[:, :, :tokens], keys) and not kv.buffer[:, :, tokens:].any() for kv in cache)
        buffers = [kv.buffer for kv in cache]
        open_windows(cache, tokens)
        assert all(kv.buffer is buffer for kv, buffer in zip(cache, buffers))


@pytest.fixture
def steps():
    """A prompt with an image, and words behind it: (name of the words, lengths) -> inputs."""
    def make(plain: ErnieVL, words: torch.Tensor, lengths: list[int]) -> list:
        question = [{"role": "user", "content": ["Describe this image.", load_image(EXAMPLE, TINY)]}]
        prompt = plain.prepare(*encode_chat(Tokenizer(TINY), question))
        none, first = prompt._replace(patches=prompt.patches[:0], grids=[]), prompt.positions.max() + 1
        places = torch.arange(first, first + len(words))
        return [prompt, *(none._replace(ids=ids, positions=at.expand(3, -1), is_vision=torch.zeros(len(ids), dtype=torch.bool))
                          for ids, at in zip(words.split(lengths), places.split(lengths)))]
    return make


def compiled_or_skip(model: ErnieVL) -> CompiledErnieVL:
    said = []
    compiled = compile_model(model, said.append)
    if any("nothing can be compiled" in line for line in said):
        pytest.skip("needs a C++ compiler")
    return compiled


def greatest_error(plain: ErnieVL, compiled: CompiledErnieVL, inputs: list) -> tuple[float, list[KVCache]]:
    """Of the logits, in parts of their largest; and the cache of the compiled model."""
    caches, error = [[KVCache() for _ in model.layers] for model in (plain, compiled)], 0
    with torch.inference_mode():
        for some in inputs:
            one, two = (model(some, cache, only_last=True) for model, cache in zip((plain, compiled), caches))
            error = max(error, distance(one, two) / float(one.abs().max()))
    assert {kv.length for cache in caches for kv in cache} == {sum(len(some.ids) for some in inputs)}
    return error, caches[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")      # of torch's own compiler
def test_a_compiled_step_computes_what_a_plain_one_does(steps):
    """Behind an image, across windows of 256 and 512 tokens, and in a second turn, whose prompt is longer than what is left."""
    plain, words, lengths = load(TINY), torch.arange(20, 90).repeat(5)[:308], [*[1] * 230, 70, *[1] * 8]
    error, cache = greatest_error(plain, compiled_or_skip(load(TINY)), steps(plain, words, lengths))
    assert error < 1e-5 and cache[0].buffer.shape[2] == 512


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_step_with_quantised_layers(steps):
    """Of both kinds in one model, because compiling takes longest. They compute in bf16, and are compared with their weights
    written out, in words that the model knows."""
    plain = load(TINY)
    int8, int4 = (load(TINY, stages=[quantize.stage(kind)]) for kind in quantize.KINDS)
    int8.layers = nn.ModuleList([int4.layers[0], int8.layers[1], int4.layers[2], plain.layers[3]])
    compiled = compiled_or_skip(copy.deepcopy(int8))
    for name, layer in int8.named_modules():
        if isinstance(layer, quantize.QuantizedLinear):
            plain.get_submodule(name).weight = nn.Parameter(layer.dequantized(layer.weight, layer.scale).float())
    words = torch.tensor(Tokenizer(TINY).encode("A red star in the middle."))
    assert greatest_error(plain, compiled, steps(plain, words, [1] * len(words)))[0] < 0.02


def test_a_compiled_model_is_a_wrapper(monkeypatch):
    """Without a cache, and for what is not one token of text, it calls the model that it wraps."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    said, plain = [], load(TINY)
    compiled = compile_model(load(TINY), said.append)
    assert type(compiled) is CompiledErnieVL and type(compiled.model) is ErnieVL and compiled.cfg is compiled.model.cfg
    assert compiled.layers is compiled.model.layers and not compiled.training and len(said) == 1
    assert not any(isinstance(module, Experts) for module in compiled.modules())
    passes = []
    compiled.model.register_forward_hook(lambda *given: passes.append(1))
    cache, mine = ([KVCache() for _ in plain.layers] for _ in range(2))
    for ids, calls in (([5, 6, 7], 1), ([8], 0), ([9, 10], 1), ([11], 0), ([plain.cfg.image_end_token_id], 1)):
        inputs = plain.prepare(ids)
        assert distance(compiled(inputs, cache), plain(inputs, mine)) < 1e-4
        assert len(passes) == calls and cache[0].length == mine[0].length
        passes.clear()
    assert distance(compiled(plain.prepare([5])), plain(plain.prepare([5]))) < 1e-4 and passes == [1]


def test_an_fp64_model_is_refused():
    with pytest.raises(InputError, match="no fp64"):
        compile_model(load(TINY, dtype=torch.float64))


def test_without_a_compiler_it_goes_on_without_after_a_sentence(tmp_path):
    script = """if True:
        import sys
        from ernie_vl import generate
        from extras.compiled import compile_model
        from load_weights import load
        plain, model = load("tiny"), load("tiny")
        plain.layers, model.layers = plain.layers[:2], model.layers[:2]      # compiling them would take less time
        compiled, prompt = compile_model(model, print), plain.prepare([5, 6, 7])
        answers = [list(generate(one, prompt, stop=(), max_new_tokens=8)) for one in (plain, compiled)]
        sys.exit(answers[0] != answers[1])"""
    alone = dict(os.environ, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0 and done.stdout.count("nothing can be compiled here") == 1, done.stderr
